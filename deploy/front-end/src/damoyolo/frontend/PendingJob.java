package damoyolo.frontend;

import java.util.HashMap;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicBoolean;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.WorkerThread;

/**
 * A job that waits for its answer. Whoever claims it first answers it, so that an answer of a worker that comes
 * after the time limit does no harm. TorchServe forgets the jobs of a model that is unregistered, and those of a
 * model without workers wait for good; here both are answered.
 */
final class PendingJob {
    private static final long SECOND_NS = 1_000_000_000L;
    /** For the queue before the batch, and a worker's restart. */
    private static final int QUEUE_S = 60;
    private static final Set<PendingJob> ALL = ConcurrentHashMap.newKeySet();

    private final Job job;
    private final Model model; // null where it does not exist; TorchServe then refuses the job
    private final long limitNs;
    private final AtomicBoolean claimed = new AtomicBoolean();

    private PendingJob(Job job) {
        this.job = job;
        model = registered(job.getModelName(), job.getModelVersion());
        int seconds = Setting.ANSWER_TIMEOUT_S.seconds();
        limitNs = seconds > 0 || model == null ? seconds * SECOND_NS : (model.getResponseTimeout() + (long) QUEUE_S) * SECOND_NS;
    }

    /** To be followed by `register`, once the job knows this: others may answer it from then on. */
    static PendingJob of(Job job) {
        return new PendingJob(job);
    }

    void register() {
        ALL.add(this);
    }

    /** Whether the caller is the one that answers. */
    boolean claim() {
        return claimed.compareAndSet(false, true) && ALL.remove(this);
    }

    /** The client is gone. */
    void abandon() {
        if (drop() && isPrediction()) {
            ServerMetrics.refused(model, ServerMetrics.ABANDONED);
        }
    }

    /** The client has an answer of another origin. Returns whether it had none of this job. */
    boolean drop() {
        boolean isOpen = claim();
        if (isOpen) {
            dequeue();
        }
        return isOpen;
    }

    /** Others are not measured: a description is written without the network. */
    private boolean isPrediction() {
        return model != null && job.getCmd() != WorkerCommands.DESCRIBE;
    }

    /** A worker took the job out of the queue. */
    void taken() {
        if (isPrediction()) {
            ServerMetrics.waited(model, job.getScheduled() - job.getBegin());
        }
    }

    /** Called with the status of any answer that a client gets. */
    void measure(int status) {
        if (isPrediction()) {
            ServerMetrics.answered(model, status, System.nanoTime() - job.getBegin());
        }
    }

    /** Called with the status of an answer of a worker. */
    void answered(int status) {
        measure(status);
        if (isPrediction() && status >= 200 && status < 300) {
            ModelHealth.of(model).succeeded();
        }
    }

    /** Claims a job that the queue did not take, and counts it; why, for the client, or null if that is not known. */
    String whyNotQueued() {
        if (model == null) {
            return null;
        }
        if (claim() && isPrediction()) {
            ServerMetrics.refused(model, 503);
        }
        String reason = whyHopeless(model);
        return reason != null ? reason : "The queue of model \"" + model.getModelName() + "\" is full: "
                + (model.getPendingRequestsInJobQueue() + model.getJobQueueRemainingCapacity())
                + " requests wait (jobQueueSize in its model-config.yaml). Send the request again later.";
    }

    /** The number of open jobs of each model. */
    static Map<Model, Integer> countByModel() {
        Map<Model, Integer> counts = new HashMap<>();
        for (PendingJob pending : ALL) {
            if (pending.model != null) {
                counts.merge(pending.model, 1, Integer::sum);
            }
        }
        return counts;
    }

    static void refuseAll(String reason) {
        ALL.forEach(pending -> FrontEnd.attempt(() -> pending.refuse(503, reason)));
    }

    /** Answers the jobs whose time is over, and those that nobody will answer. */
    static void sweep() {
        long now = System.nanoTime();
        Map<Model, Optional<String>> hopeless = new HashMap<>();
        for (PendingJob pending : ALL) {
            if (pending.model == null) {
                continue;
            }
            Optional<String> reason =
                    hopeless.computeIfAbsent(pending.model, model -> Optional.ofNullable(whyHopeless(model)));
            if (reason.isPresent()) {
                FrontEnd.attempt(() -> pending.refuse(503, reason.get()));
            } else if (now - pending.job.getBegin() > pending.limitNs) {
                FrontEnd.attempt(() -> pending.refuse(504, "No answer within " + pending.limitNs / SECOND_NS + " s ("
                        + Setting.ANSWER_TIMEOUT_S.key() + " in config.properties; by default the model's responseTimeout and "
                        + QUEUE_S + " s)."));
            }
        }
    }

    private void refuse(int status, String message) {
        job.sendError(status, message); // claims it
        dequeue();
    }

    private void dequeue() {
        if (model != null) {
            ModelQueue.remove(model, job);
        }
    }

    /** Why no job of the model will be answered, or null. */
    private static String whyHopeless(Model model) {
        if (registered(model.getModelName(), model.getVersion()) != model) {
            return "Version " + model.getVersion() + " of model \"" + model.getModelName() + "\" was unregistered.";
        }
        boolean served = ModelManager.getInstance().getWorkers(model.getModelVersionName()).stream()
                .anyMatch(WorkerThread::isHealthy);
        return served ? null : "Model \"" + model.getModelName() + "\" has no worker: it is scaled to 0, or its workers "
                + "failed for longer than maxRetryTimeoutInSec in its model-config.yaml.";
    }

    private static Model registered(String name, String version) {
        try {
            return Objects.requireNonNull(ModelManager.getInstance()).getModel(name, version);
        } catch (ModelVersionNotFoundException error) {
            return null;
        }
    }
}
