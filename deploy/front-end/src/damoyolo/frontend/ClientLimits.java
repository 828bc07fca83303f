package damoyolo.frontend;

import io.netty.buffer.ByteBuf;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelOutboundBuffer;
import io.netty.handler.timeout.IdleStateEvent;
import io.netty.handler.timeout.IdleStateHandler;
import io.netty.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;

/**
 * Ends connections whose client is too slow, below the codec: one that sends no whole request in time gets 408, and
 * one that neither sends nor reads for `front_end_idle_timeout_s` is closed. A request that waits for its answer is
 * no matter of the client; PendingJob limits that time.
 */
final class ClientLimits extends IdleStateHandler {
    /** Requests that arrive at this rate have as much time as they need. */
    private static final long BYTES_PER_S = 10_000;
    private static final long SECOND_NS = 1_000_000_000L;

    private final RequestGate gate;
    private long startNs;
    private long received; // bytes since then
    private ScheduledFuture<?> check;

    ClientLimits(RequestGate gate) {
        super(true, 0, 0, Setting.IDLE_TIMEOUT_S.seconds(), TimeUnit.SECONDS);
        this.gate = gate;
    }

    @Override
    public void channelRead(ChannelHandlerContext context, Object message) throws Exception {
        if (!gate.isReceiving()) {
            gate.startReceiving();
            startNs = System.nanoTime();
            received = 0;
        }
        if (message instanceof ByteBuf) {
            received += ((ByteBuf) message).readableBytes();
        }
        super.channelRead(context, message);
    }

    @Override
    public void channelReadComplete(ChannelHandlerContext context) throws Exception {
        super.channelReadComplete(context);
        if (gate.isReceiving() && check == null) { // most requests are complete by now
            scheduleCheck(context);
        }
    }

    private void scheduleCheck(ChannelHandlerContext context) {
        check = context.executor().schedule(() -> check(context), remainingNs(), TimeUnit.NANOSECONDS);
    }

    private void check(ChannelHandlerContext context) {
        check = null;
        if (!gate.isReceiving()) {
            return;
        }
        if (!gate.hasHeaders() && gate.isWaitingForAnswer()) { // bytes behind a request must not cost its answer
            startNs = System.nanoTime();
        }
        if (remainingNs() > 0) { // another request, or more of the same
            scheduleCheck(context);
        } else {
            gate.timeOut(context, gate.hasHeaders() ? Setting.REQUEST_TIMEOUT_S : Setting.HEADER_TIMEOUT_S);
        }
    }

    private long remainingNs() {
        long limit = gate.hasHeaders()
                ? Setting.REQUEST_TIMEOUT_S.nanos() + received * (SECOND_NS / BYTES_PER_S)
                : Setting.HEADER_TIMEOUT_S.nanos();
        return startNs + limit - System.nanoTime();
    }

    @Override
    protected void channelIdle(ChannelHandlerContext context, IdleStateEvent event) {
        ChannelOutboundBuffer unsent = context.channel().unsafe().outboundBuffer();
        boolean isReading = unsent == null || unsent.totalPendingWriteBytes() == 0;
        if (gate.isReceiving() && isReading) {
            gate.timeOut(context, Setting.IDLE_TIMEOUT_S);
        } else if (!gate.isWaitingForAnswer() || !isReading) {
            context.close();
        }
    }

    @Override
    public void channelInactive(ChannelHandlerContext context) throws Exception {
        if (check != null) {
            check.cancel(false);
        }
        super.channelInactive(context);
    }
}
