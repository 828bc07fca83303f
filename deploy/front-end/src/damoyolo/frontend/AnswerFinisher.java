package damoyolo.frontend;

import io.netty.channel.ChannelHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelOutboundHandlerAdapter;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import org.pytorch.serve.util.ConfigManager;

/** Completes every answer just before it is encoded. */
@ChannelHandler.Sharable
final class AnswerFinisher extends ChannelOutboundHandlerAdapter {
    static final AnswerFinisher INSTANCE = new AnswerFinisher();
    /** Of a busy server: a batch later the queue has room. */
    private static final int RETRY_AFTER_S = 1;
    /** Of a server that ends: about the time until another one listens. */
    private static final int RETRY_AFTER_END_S = 5;

    @Override
    public void write(ChannelHandlerContext context, Object message, ChannelPromise promise) {
        Object finished = message;
        if (message instanceof HttpResponse) {
            HttpResponse response = (HttpResponse) message;
            // Without one TorchServe writes "HTTP/1.1 200 ", which load generators count as a failure.
            if (response.status().reasonPhrase().isEmpty()) {
                response.setStatus(HttpResponseStatus.valueOf(response.status().code()));
            }
            if (response.status().code() == HttpResponseStatus.SERVICE_UNAVAILABLE.code()
                    && !response.headers().contains(HttpHeaderNames.RETRY_AFTER)) {
                response.headers().setInt(HttpHeaderNames.RETRY_AFTER, Drain.isDraining() ? RETRY_AFTER_END_S : RETRY_AFTER_S);
            }
            if (response instanceof FullHttpResponse && !((FullHttpResponse) response).content().isReadable()) {
                finished = withBody((FullHttpResponse) response);
            }
            if (response.status().code() >= HttpResponseStatus.BAD_REQUEST.code() && finished instanceof FullHttpResponse
                    && context.pipeline().get(RequestGate.class).hasProtocolErrors()) {
                finished = InferenceProtocol.withError((FullHttpResponse) finished);
            }
        }
        context.write(finished, promise);
    }

    /** Netty's own errors, which are empty, with a body like all others; other answers stay as they are. */
    private static FullHttpResponse withBody(FullHttpResponse empty) {
        FullHttpResponse answer;
        if (empty.status().code() == HttpResponseStatus.REQUEST_ENTITY_TOO_LARGE.code()) {
            answer = ErrorAnswer.closing(empty.status(), "PayloadTooLargeException", "The request body has more than "
                    + ConfigManager.getInstance().getMaxRequestSize() + " bytes (max_request_size in config.properties).");
        } else if (empty.status().code() == HttpResponseStatus.EXPECTATION_FAILED.code()) {
            answer = ErrorAnswer.closing(empty.status(), "ExpectationFailedException",
                    "The header Expect has a value other than 100-continue.");
        } else {
            return empty;
        }
        answer.headers().setAll(empty.headers());
        answer.headers().setInt(HttpHeaderNames.CONTENT_LENGTH, answer.content().readableBytes());
        empty.release();
        return answer;
    }
}
