package damoyolo.frontend;

import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentMap;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.WorkerState;
import org.pytorch.serve.wlm.WorkerThread;

/**
 * Whether a version of a model answers: its workers are loaded, and a recent inference succeeded. Answers to
 * clients count; without any, somebody who asks causes an inference of a built-in image, one at a time.
 */
final class ModelHealth {
    /** A result is kept for this time, so that frequent questions cost little while a model fails. */
    private static final long KEPT_NS = 1_000_000_000L;
    private static final ConcurrentMap<Model, ModelHealth> ALL = new ConcurrentHashMap<>();

    private final Model model;
    private volatile boolean hasSucceeded;
    private volatile long successNs;
    private CompletableFuture<String> probe; // guarded by this, as the next
    private long probeNs;

    private ModelHealth(Model model) {
        this.model = model;
    }

    static ModelHealth of(Model model) {
        ModelHealth health = ALL.get(model);
        return health != null ? health : ALL.computeIfAbsent(model, ModelHealth::new);
    }

    /** Forgets unregistered models, and what a model's workers did before one of them ended. */
    static void sweep(ModelManager manager) {
        for (ModelHealth health : ALL.values()) {
            boolean registered = manager.getAllModels().stream()
                    .anyMatch(model -> model.getValue().getVersionModel(health.model.getVersion()) == health.model);
            if (!registered) {
                ALL.remove(health.model);
            } else if (health.whyNotLoaded() != null) {
                health.hasSucceeded = false;
            }
        }
    }

    /** A worker answered a request with success. */
    void succeeded() {
        successNs = System.nanoTime();
        hasSucceeded = true;
    }

    /** Whether workers were started and all of them were given up. */
    boolean isGivenUp() {
        List<WorkerThread> workers = ModelManager.getInstance().getWorkers(model.getModelVersionName());
        return !workers.isEmpty() && workers.stream().noneMatch(WorkerThread::isHealthy);
    }

    /** Why the model is not ready; null if it is. */
    CompletableFuture<String> whyNotReady() {
        String reason = whyNotLoaded();
        if (reason != null) {
            hasSucceeded = false;
            return CompletableFuture.completedFuture(reason);
        }
        boolean recent = hasSucceeded && System.nanoTime() - successNs < Setting.HEALTH_WINDOW_S.nanos();
        return recent || Setting.HEALTH_WINDOW_S.seconds() == 0 ? CompletableFuture.completedFuture(null) : probe();
    }

    private String whyNotLoaded() {
        long loaded = ModelManager.getInstance().getWorkers(model.getModelVersionName()).stream()
                .filter(worker -> worker.getState() == WorkerState.WORKER_MODEL_LOADED)
                .count();
        int wanted = Setting.READY_WORKERS.count();
        int needed = Math.max(1, wanted > 0 ? Math.min(wanted, model.getMinWorkers()) : model.getMinWorkers());
        return loaded >= needed ? null : loaded + " of " + needed + " workers have loaded the model";
    }

    private synchronized CompletableFuture<String> probe() {
        if (probe == null || probe.isDone() && System.nanoTime() - probeNs > KEPT_NS) {
            probeNs = System.nanoTime();
            probe = startProbe();
        }
        return probe;
    }

    private CompletableFuture<String> startProbe() {
        CompletableFuture<String> result = new CompletableFuture<>();
        ProbeJob job = new ProbeJob(model, status -> {
            if (status >= 200 && status < 300) {
                succeeded();
                result.complete(null);
            } else {
                result.complete("the built-in image was answered with status " + status);
            }
        });
        try {
            model.addFirst(job);
        } catch (IllegalStateException error) {
            result.complete("the queue is full, and nothing was answered for " + Setting.HEALTH_WINDOW_S.seconds() + " s");
            return result;
        }
        FrontEnd.SCHEDULER.schedule(() -> {
            if (result.complete("no answer to the built-in image within " + Setting.HEALTH_TIMEOUT_S.seconds() + " s")) {
                ModelQueue.remove(model, job);
            }
        }, Setting.HEALTH_TIMEOUT_S.seconds(), TimeUnit.SECONDS);
        return result;
    }
}
