package damoyolo.frontend;

import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.util.concurrent.BlockingDeque;
import java.util.concurrent.ConcurrentMap;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.wlm.Model;

/** The queue of a model, out of which TorchServe has no way to take a job that nobody waits for. */
final class ModelQueue {
    private static final VarHandle QUEUES = handle();

    private ModelQueue() {}

    /** Finds the field, as a first use of the class does. */
    static void require() {}

    private static VarHandle handle() {
        try {
            return MethodHandles.privateLookupIn(Model.class, MethodHandles.lookup())
                    .findVarHandle(Model.class, "jobsDb", ConcurrentMap.class);
        } catch (ReflectiveOperationException error) {
            throw new LinkageError("the class Model has another queue", error);
        }
    }

    /** Removes the job if no worker has taken it. */
    static void remove(Model model, Job job) {
        Object queue = ((ConcurrentMap<?, ?>) QUEUES.get(model)).get(Model.DEFAULT_DATA_QUEUE);
        ((BlockingDeque<?>) queue).remove(job);
    }
}
