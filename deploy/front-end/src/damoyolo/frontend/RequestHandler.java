package damoyolo.frontend;

import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelOption;
import io.netty.channel.ChannelPipeline;
import io.netty.channel.SimpleChannelInboundHandler;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpServerKeepAliveHandler;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.io.IOException;
import java.lang.ref.WeakReference;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.http.HttpRequestHandlerChain;
import org.pytorch.serve.http.ResourceNotFoundException;
import org.pytorch.serve.http.ServiceUnavailableException;
import org.pytorch.serve.util.NettyUtils;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * In place of TorchServe's HttpRequestHandler: prepares a request, passes it on to TorchServe's chain of
 * handlers, and answers what they throw. There is one per connection.
 */
public final class RequestHandler extends SimpleChannelInboundHandler<FullHttpRequest> {
    private static final Logger LOGGER = LoggerFactory.getLogger(RequestHandler.class);

    private static final WeakReference<PendingJob> NONE = new WeakReference<>(null);

    private final HttpRequestHandlerChain chain;
    private final RequestGate gate = new RequestGate();
    /** The last one of this connection; weak, so that an idle connection does not keep a body. */
    private WeakReference<PendingJob> pending = NONE;

    public RequestHandler(HttpRequestHandlerChain chain) {
        this.chain = chain;
    }

    /** Adds what acts on all requests and answers, those of the aggregator included (413, 100 Continue). */
    @Override
    public void handlerAdded(ChannelHandlerContext context) {
        // TorchServe sets 0, so that closing, as after every error, discards what was not sent yet and resets
        // the connection: the client may lose the answer.
        context.channel().config().setOption(ChannelOption.SO_LINGER, -1);
        ChannelPipeline pipeline = context.pipeline();
        pipeline.addBefore("http", "limits", new ClientLimits(gate));
        pipeline.addAfter("http", "keep-alive", new HttpServerKeepAliveHandler());
        pipeline.addAfter("http", "gate", gate);
        pipeline.addAfter("http", "answers", AnswerFinisher.INSTANCE);
    }

    @Override
    protected void channelRead0(ChannelHandlerContext context, FullHttpRequest request) {
        NettyUtils.requestReceived(context.channel(), request);
        pending = NONE;
        try {
            if (!request.decoderResult().isSuccess()) {
                throw new BadRequestException("The request is not valid HTTP, or its first line or headers are too long.");
            }
            QueryStringDecoder uri = new QueryStringDecoder(request.uri());
            String[] segments = segmentsOf(uri);
            if (gate.isInference()) {
                if (Health.answer(context, request, uri.path()) || Pages.answer(context, request, uri.path())
                        || ModelMetadata.answer(context, request, segments)) {
                    return;
                }
                segments = InferenceProtocol.route(request, segments);
            }
            Registration.check(request, uri, segments);
            QueryOptions.moveToHeaders(request, uri, segments);
            BodyType.settle(request);
            chain.handleRequest(context, request, uri, segments);
        } catch (Throwable error) { // as TorchServe's handler: also OutOfMemoryError
            ErrorAnswer.send(context, error instanceof ServiceUnavailableException ? explain(error) : error);
            PendingJob job = pending.get();
            if (job != null) { // the error was the answer
                job.drop();
            }
        }
    }

    /** Called by the job of the present request. */
    void waitFor(PendingJob job) {
        pending = new WeakReference<>(job);
    }

    /** TorchServe says in any case that there is no worker. */
    private Throwable explain(Throwable error) {
        PendingJob job = pending.get();
        String reason = job == null ? null : job.whyNotQueued();
        return reason == null ? error : new ServiceUnavailableException(reason);
    }

    private static String[] segmentsOf(QueryStringDecoder uri) {
        String[] segments;
        try {
            uri.parameters(); // decodes them, so that errors in them arise here
            segments = uri.path().split("/");
        } catch (IllegalArgumentException error) {
            throw new BadRequestException("The address has a % that two hexadecimal digits do not follow.");
        }
        if (segments.length == 1) { // no slash, as in OPTIONS *; TorchServe takes for granted that there is one
            throw new ResourceNotFoundException();
        }
        return segments;
    }

    /** Spares the workers a request whose client is gone. */
    @Override
    public void channelInactive(ChannelHandlerContext context) throws Exception {
        PendingJob job = pending.get();
        if (job != null) {
            job.abandon();
        }
        super.channelInactive(context);
    }

    @Override
    public void exceptionCaught(ChannelHandlerContext context, Throwable error) {
        if (!(error instanceof IOException)) { // such as a client that disconnects, which is no event
            LOGGER.warn("A connection was closed because of {}", ErrorAnswer.describe(error));
        }
        if (error instanceof OutOfMemoryError) { // no room for the body; as TorchServe's handler
            ErrorAnswer.send(context, error);
        }
        context.close();
    }
}
