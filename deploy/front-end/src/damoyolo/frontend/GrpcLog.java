package damoyolo.frontend;

import java.util.concurrent.atomic.AtomicLong;
import java.util.logging.Handler;
import java.util.logging.Level;
import java.util.logging.LogRecord;
import java.util.logging.Logger;

/**
 * Limits what the gRPC library logs. It writes to standard error through java.util.logging, so log4j2.xml does
 * not apply: 2 kB for each connection that does not speak gRPC.
 */
final class GrpcLog {
    private static final long PAUSE_NS = 1_000_000_000L;
    private static final AtomicLong NEXT_NS = new AtomicLong(System.nanoTime());

    private GrpcLog() {}

    static void limit() {
        for (Handler handler : Logger.getLogger("").getHandlers()) {
            handler.setFilter(GrpcLog::isLoggable);
        }
    }

    /** Warnings and errors, one per second. */
    private static boolean isLoggable(LogRecord record) {
        long now = System.nanoTime();
        long next = NEXT_NS.get();
        return record.getLevel().intValue() >= Level.WARNING.intValue()
                && now - next >= 0
                && NEXT_NS.compareAndSet(next, now + PAUSE_NS);
    }
}
