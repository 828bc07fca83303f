package damoyolo.frontend;

import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelFuture;
import io.netty.channel.ChannelFutureListener;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.HttpExpectationFailedEvent;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpStatusClass;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.util.ReferenceCountUtil;
import java.net.InetSocketAddress;
import java.net.SocketAddress;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.ConnectorType;

/**
 * Follows the requests of one connection from their headers to their answers, between codec and aggregator. Counts
 * those on the port for inference, and refuses them there while the server drains.
 */
final class RequestGate extends ChannelDuplexHandler {
    private static final SocketAddress INFERENCE =
            ConfigManager.getInstance().getListener(ConnectorType.INFERENCE_CONNECTOR).getSocketAddress();

    /** Within it a client reads the last answer; closing with bytes unread could lose it. */
    private static final int LINGER_S = 1;

    private boolean isInference;
    private int open; // requests that were let in and whose answers are not sent yet
    private boolean receiving;
    private boolean hasHeaders; // of the request that is being received
    private ChannelFuture refusal; // not null: the rest of the request is discarded
    private boolean isEnded; // what arrives is discarded until the connection is closed
    private boolean hasProtocolErrors; // the last request; the next one follows its answer

    @Override
    public void handlerAdded(ChannelHandlerContext context) {
        SocketAddress local = context.channel().localAddress();
        isInference = local instanceof InetSocketAddress && INFERENCE instanceof InetSocketAddress
                ? ((InetSocketAddress) local).getPort() == ((InetSocketAddress) INFERENCE).getPort()
                : INFERENCE.equals(local);
    }

    /** Whether the connection belongs to the port for inference (there may be one port for all). */
    boolean isInference() {
        return isInference;
    }

    /** Whether an error is answered as InferenceProtocol says. */
    boolean hasProtocolErrors() {
        return hasProtocolErrors;
    }

    /** Called with the first bytes of each request. */
    void startReceiving() {
        receiving = true;
        hasHeaders = false;
    }

    boolean isReceiving() {
        return receiving;
    }

    boolean hasHeaders() {
        return hasHeaders;
    }

    boolean isWaitingForAnswer() {
        return open > 0;
    }

    /**
     * Netty reads what follows the headers of a request with an `Expect` that it does not meet (413, 417) as the next
     * request. A client that sends the body all the same could hide a request in it from a proxy.
     */
    @Override
    public void userEventTriggered(ChannelHandlerContext context, Object event) throws Exception {
        isEnded = isEnded || event instanceof HttpExpectationFailedEvent;
        super.userEventTriggered(context, event);
    }

    @Override
    public void channelRead(ChannelHandlerContext context, Object message) throws Exception {
        if (isEnded) {
            receiving = false;
            ReferenceCountUtil.release(message);
            return;
        }
        if (message instanceof HttpRequest) {
            hasHeaders = true;
            String path = InferenceProtocol.pathOf(((HttpRequest) message).uri());
            hasProtocolErrors = isInference && InferenceProtocol.isAddress(path);
            if (refusal == null) {
                open(context, (HttpRequest) message, path);
            }
        }
        boolean isEnd = message instanceof LastHttpContent;
        receiving = receiving && !isEnd;
        if (refusal == null) {
            super.channelRead(context, message);
            return;
        }
        ReferenceCountUtil.release(message);
        if (isEnd) { // not before: closing with bytes unread would reset the connection and lose the answer
            refusal.addListener(ChannelFutureListener.CLOSE);
        }
    }

    private void open(ChannelHandlerContext context, HttpRequest request, String path) {
        if (isInference) { // counted before the look, so that the drain sees what was let in
            Drain.opened();
        }
        if (!isInference || !Drain.isRefusing() || path.startsWith(Health.PREFIX) || ModelMetadata.isReadiness(path)) {
            open++;
            return;
        }
        Drain.refused();
        Drain.closed(1);
        // Behind a request that is not answered yet, the answer to that one closes the connection.
        refusal = open > 0 ? context.newPromise() : context.writeAndFlush(ErrorAnswer.closing(
                HttpResponseStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableException", "The server is about to end."));
        if (open == 0 && HttpUtil.is100ContinueExpected(request)) { // no body follows
            refusal.addListener(ChannelFutureListener.CLOSE);
        }
    }

    @Override
    public void write(ChannelHandlerContext context, Object message, ChannelPromise promise) {
        boolean isInterim = message instanceof HttpResponse
                && ((HttpResponse) message).status().codeClass() == HttpStatusClass.INFORMATIONAL;
        boolean closes = isInference && Drain.isDraining() && open <= 1 && !isInterim;
        if ((closes || isEnded) && message instanceof HttpResponse) {
            ((HttpResponse) message).headers().set(HttpHeaderNames.CONNECTION, HttpHeaderValues.CLOSE);
        }
        ChannelPromise done = promise;
        if (message instanceof LastHttpContent && !isInterim) {
            done = promise.unvoid();
            done.addListener(future -> close(1));
            if (closes) {
                done.addListener(ChannelFutureListener.CLOSE);
            } else if (isEnded) {
                context.executor().schedule(() -> context.close(), LINGER_S, TimeUnit.SECONDS);
            }
        }
        context.write(message, done);
    }

    private void close(int requests) {
        int closed = Math.min(requests, open);
        open -= closed;
        if (isInference) {
            Drain.closed(closed);
        }
    }

    /** Answers a request that did not arrive in time, and closes the connection. */
    void timeOut(ChannelHandlerContext context, Setting setting) {
        context.pipeline().context(this).writeAndFlush(ErrorAnswer.closing(
                HttpResponseStatus.REQUEST_TIMEOUT, "RequestTimeoutException",
                "The request did not arrive within its time (" + setting.key() + " in config.properties)."))
                .addListener(ChannelFutureListener.CLOSE);
    }

    @Override
    public void channelInactive(ChannelHandlerContext context) throws Exception {
        close(open);
        super.channelInactive(context);
    }
}
