package damoyolo.frontend;

import io.netty.buffer.ByteBufUtil;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpVersion;
import java.util.Arrays;
import java.util.stream.Collectors;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.archive.workflow.WorkflowNotFoundException;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.http.ConflictStatusException;
import org.pytorch.serve.http.InternalServerException;
import org.pytorch.serve.http.MethodNotAllowedException;
import org.pytorch.serve.http.RequestTimeoutException;
import org.pytorch.serve.http.ResourceNotFoundException;
import org.pytorch.serve.http.ServiceUnavailableException;
import org.pytorch.serve.util.NettyUtils;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Answers an exception: TorchServe's own with its status and message, any other with 500.
 *
 * <p>The message of an exception that is not TorchServe's may hold bytes of the body. It goes neither into
 * the answer nor into the log, which gets one line for a 500 and nothing for what the client caused.
 */
final class ErrorAnswer {
    private static final Logger LOGGER = LoggerFactory.getLogger(ErrorAnswer.class);

    private ErrorAnswer() {}

    static void send(ChannelHandlerContext context, Throwable error) {
        HttpResponseStatus status = statusOf(error);
        if (status != null) {
            NettyUtils.sendError(context, status, error);
        } else {
            LOGGER.error("A request failed because of {}", describe(error));
            NettyUtils.sendError(context, HttpResponseStatus.INTERNAL_SERVER_ERROR, new InternalServerException(
                    "The server failed before the model was called (" + error.getClass().getSimpleName() + ")."));
        }
    }

    /** An answer like TorchServe's own errors, after which the connection is to be closed; no quotes in `message`. */
    static FullHttpResponse closing(HttpResponseStatus status, String type, String message) {
        FullHttpResponse answer = new DefaultFullHttpResponse(HttpVersion.HTTP_1_1, status);
        ByteBufUtil.writeAscii(answer.content(),
                "{\"code\": " + status.code() + ", \"type\": \"" + type + "\", \"message\": \"" + message + "\"}\n");
        answer.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_JSON);
        answer.headers().setInt(HttpHeaderNames.CONTENT_LENGTH, answer.content().readableBytes());
        answer.headers().set(HttpHeaderNames.CONNECTION, HttpHeaderValues.CLOSE);
        return answer;
    }

    /** The class of an error and where it arose, in one line without its message. */
    static String describe(Throwable error) {
        String places = Arrays.stream(error.getStackTrace())
                .filter(frame -> !frame.getClassName().startsWith("java."))
                .limit(3)
                .map(frame -> frame.getClassName() + "." + frame.getMethodName() + ":" + frame.getLineNumber())
                .collect(Collectors.joining(" < "));
        return error.getClass().getName() + " at " + places;
    }

    /** The status of TorchServe's exceptions, as in its HttpRequestHandler; null for others. */
    private static HttpResponseStatus statusOf(Throwable error) {
        if (error instanceof ResourceNotFoundException || error instanceof ModelNotFoundException
                || error instanceof ModelVersionNotFoundException || error instanceof WorkflowNotFoundException) {
            return HttpResponseStatus.NOT_FOUND;
        }
        if (error instanceof BadRequestException || error instanceof ModelException
                || error instanceof DownloadArchiveException) {
            return HttpResponseStatus.BAD_REQUEST;
        }
        if (error instanceof ConflictStatusException) {
            return HttpResponseStatus.CONFLICT;
        }
        if (error instanceof RequestTimeoutException) {
            return HttpResponseStatus.REQUEST_TIMEOUT;
        }
        if (error instanceof MethodNotAllowedException) {
            return HttpResponseStatus.METHOD_NOT_ALLOWED;
        }
        if (error instanceof ServiceUnavailableException) {
            return HttpResponseStatus.SERVICE_UNAVAILABLE;
        }
        return error instanceof OutOfMemoryError ? HttpResponseStatus.INSUFFICIENT_STORAGE : null;
    }
}
