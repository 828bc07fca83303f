package damoyolo.frontend;

import io.grpc.Context;
import io.grpc.Metadata;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.function.Consumer;

/** One call of the gRPC service for inference: what its job needs, and its place among the open requests. */
final class GrpcCall {
    /** The present call. */
    static final Context.Key<GrpcCall> KEY = Context.key("call");

    private final Metadata metadata;
    private final AtomicBoolean isOpen = new AtomicBoolean(true);
    private volatile PendingJob pending;

    GrpcCall(Metadata metadata) {
        this.metadata = metadata;
        Drain.opened();
    }

    Metadata metadata() {
        return metadata;
    }

    void waitFor(PendingJob job) {
        pending = job;
    }

    /** Why the queue did not take the job; `otherwise` if that is not known. */
    String whyNotQueued(String otherwise) {
        PendingJob job = pending;
        String reason = job == null ? null : job.whyNotQueued();
        return reason == null ? otherwise : reason;
    }

    /** The call was answered. */
    void end() {
        end(PendingJob::drop);
    }

    /** The client is gone. */
    void cancel() {
        end(PendingJob::abandon);
    }

    private void end(Consumer<PendingJob> leave) {
        if (isOpen.compareAndSet(true, false)) {
            Drain.closed(1);
            if (pending != null) {
                leave.accept(pending);
            }
        }
    }
}
