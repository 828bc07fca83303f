package damoyolo.frontend;

import java.util.concurrent.atomic.AtomicInteger;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;
import sun.misc.Signal;

/**
 * Ends the server without losing a request: on SIGTERM readiness turns false, after `front_end_drain_delay_s` new
 * requests for inference are refused, and the JVM ends once those accepted before are answered, or after
 * `front_end_drain_grace_s`. It then ends as TorchServe does on SIGTERM, with code 143. A second SIGTERM cuts the
 * drain short, a third one halts the JVM.
 */
final class Drain {
    static final String WHY_NOT_READY = "the server is about to end";
    private static final Logger LOGGER = LoggerFactory.getLogger(Drain.class);
    private static final int EXIT_CODE = 128 + 15; // as Java ends on SIGTERM
    private static final long POLL_MS = 20;
    /** After the last refusal: clients of refused requests are gone, or have come back and got their answer. */
    private static final long QUIET_NS = 300_000_000L;
    private static final long LONGEST_QUIET_NS = 2_000_000_000L;
    /** For writing the last answers. */
    private static final long FLUSH_MS = 200;
    /** TorchServe takes 4 to 6 s to end; it waits without a limit for gRPC calls that do not. */
    private static final long HALT_MS = 20_000;

    private static final AtomicInteger OPEN_REQUESTS = new AtomicInteger();
    private static final AtomicInteger SIGNALS = new AtomicInteger();
    private static volatile boolean draining;
    private static volatile boolean refusing;
    private static volatile long lastRefusalNs;

    private Drain() {}

    static void handleSignal() {
        Signal.handle(new Signal("TERM"), signal -> {
            switch (SIGNALS.incrementAndGet()) {
                case 1:
                    drain();
                    break;
                case 2:
                    end();
                    break;
                default:
                    Runtime.getRuntime().halt(EXIT_CODE);
            }
        });
    }

    /** Whether readiness is false because the server is about to end. */
    static boolean isDraining() {
        return draining;
    }

    /** Whether a new request for inference is refused. */
    static boolean isRefusing() {
        return refusing;
    }

    static void refused() {
        lastRefusalNs = System.nanoTime();
    }

    static void opened() {
        OPEN_REQUESTS.incrementAndGet();
    }

    static void closed(int requests) {
        OPEN_REQUESTS.addAndGet(-requests);
    }

    private static void drain() {
        draining = true;
        LOGGER.warn("SIGTERM: {} requests are open; the server ends once they are answered, in {} s at the latest",
                OPEN_REQUESTS.get(), Setting.DRAIN_DELAY_S.seconds() + Setting.DRAIN_GRACE_S.seconds());
        pause(1000L * Setting.DRAIN_DELAY_S.seconds());
        refusing = true;
        long start = System.nanoTime();
        long doneNs = start;
        lastRefusalNs = start - QUIET_NS;
        while (System.nanoTime() - start < Setting.DRAIN_GRACE_S.nanos()) {
            long now = System.nanoTime();
            if (OPEN_REQUESTS.get() > 0) {
                doneNs = now;
            } else if (now - lastRefusalNs >= QUIET_NS || now - doneNs >= LONGEST_QUIET_NS) {
                break;
            }
            pause(POLL_MS);
        }
        end();
    }

    private static void end() {
        int open = OPEN_REQUESTS.get();
        if (open > 0) {
            LOGGER.warn("{} requests are not answered in time and get 503", open);
        }
        refusing = true;
        Thread halt = new Thread(() -> {
            pause(HALT_MS);
            Runtime.getRuntime().halt(EXIT_CODE);
        }, "drain-halt");
        halt.setDaemon(true);
        halt.start();
        try {
            PendingJob.refuseAll("The server ends; its time for answers (" + Setting.DRAIN_GRACE_S.key() + ") is over.");
            pause(FLUSH_MS);
        } finally {
            System.exit(EXIT_CODE);
        }
    }

    private static void pause(long milliseconds) {
        try {
            Thread.sleep(milliseconds);
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }
}
