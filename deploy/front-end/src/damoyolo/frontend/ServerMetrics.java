package damoyolo.frontend;

import io.prometheus.client.Collector;
import io.prometheus.client.CollectorRegistry;
import io.prometheus.client.Counter;
import io.prometheus.client.GaugeMetricFamily;
import io.prometheus.client.Histogram;
import java.util.HashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.function.Consumer;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.WorkerState;
import org.pytorch.serve.wlm.WorkerThread;

/** What only the server can measure: waiting in the queue, whole requests, answers, and the present queue and workers. */
final class ServerMetrics extends Collector {
    private static final String[] MODEL = {"model_name", "model_version"};
    private static final double[] BUCKETS_S = {
        0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60
    };
    private static final Histogram QUEUE = Histogram.build(
            "damoyolo_queue_duration_seconds", "Time until a request was sent to a worker, the wait for the rest of its batch included.")
            .labelNames(MODEL).buckets(BUCKETS_S).register();
    private static final Histogram REQUEST = Histogram.build(
            "damoyolo_request_duration_seconds", "Time from a complete request to its answer; without those that the queue refused.")
            .labelNames(MODEL).buckets(BUCKETS_S).register();
    private static final Counter RESPONSES = Counter.build(
            "damoyolo_responses_total", "Answers to requests that were complete and named a model, by HTTP status; 499 for clients that left before. "
            + "Not those that the server refused before: 400, 404, 408, 413, and 503 while it ends.")
            .labelNames("model_name", "model_version", "code").register();
    /** Series that exist from the start, so that their first growth is seen. */
    private static final String[] USUAL_CODES = {"200", "400", "415", "422", "499", "500", "503", "504", "507"};
    /** In place of a status, for a client that did not wait for the answer; nginx has the same number in its log. */
    static final int ABANDONED = 499;
    private static final double NS = 1e-9;

    private ServerMetrics() {}

    /** Called once, before TorchServe is changed: what can fail here fails then. */
    static void require() {
        CollectorRegistry.defaultRegistry.register(new ServerMetrics());
    }

    /** A worker took a request. */
    static void waited(Model model, long ns) {
        QUEUE.labels(model.getModelName(), model.getVersion()).observe(ns * NS);
    }

    /** A request was answered by a worker, or given up. */
    static void answered(Model model, int code, long ns) {
        REQUEST.labels(model.getModelName(), model.getVersion()).observe(ns * NS);
        refused(model, code);
    }

    /** A request was answered before it waited, or not at all. */
    static void refused(Model model, int code) {
        RESPONSES.labels(model.getModelName(), model.getVersion(), Integer.toString(code)).inc();
    }

    /** The registered versions of all models. */
    static void forEachModel(Consumer<Model> action) {
        ModelManager manager = ModelManager.getInstance();
        if (manager != null) { // null while the server starts
            manager.getAllModels().forEach(versions ->
                    versions.getValue().getAllVersions().forEach(version -> action.accept(version.getValue())));
        }
    }

    @Override
    public List<MetricFamilySamples> collect() {
        GaugeMetricFamily waiting = family("damoyolo_queue_requests", "Requests that wait for a worker.");
        GaugeMetricFamily capacity = family("damoyolo_queue_capacity_requests", "The most requests that can wait (jobQueueSize).");
        GaugeMetricFamily open = family("damoyolo_requests_in_flight", "Requests without an answer yet: waiting and in workers.");
        GaugeMetricFamily wanted = family("damoyolo_workers_wanted", "Workers that the model should have (minWorkers).");
        GaugeMetricFamily workers = new GaugeMetricFamily("damoyolo_workers", "Workers by state.",
                List.of("model_name", "model_version", "state"));
        Map<Model, Integer> inFlight = PendingJob.countByModel();
        forEachModel(model -> {
            List<String> labels = List.of(model.getModelName(), model.getVersion());
            waiting.addMetric(labels, model.getPendingRequestsInJobQueue());
            capacity.addMetric(labels, model.getPendingRequestsInJobQueue() + model.getJobQueueRemainingCapacity());
            open.addMetric(labels, inFlight.getOrDefault(model, 0));
            wanted.addMetric(labels, model.getMinWorkers());
            countWorkers(model).forEach((state, count) ->
                    workers.addMetric(List.of(model.getModelName(), model.getVersion(), state), count));
        });
        return List.of(waiting, capacity, open, wanted, workers);
    }

    /** The number of workers in each state, those without any included; a worker that starts may have no state yet. */
    private static Map<String, Integer> countWorkers(Model model) {
        Map<String, Integer> counts = new HashMap<>();
        for (WorkerState state : WorkerState.values()) {
            counts.put(nameOf(state), 0);
        }
        for (WorkerThread worker : ModelManager.getInstance().getWorkers(model.getModelVersionName())) {
            WorkerState state = worker.getState();
            counts.merge(nameOf(state == null ? WorkerState.WORKER_STARTED : state), 1, Integer::sum);
        }
        return counts;
    }

    private static String nameOf(WorkerState state) {
        return state.name().toLowerCase(Locale.ROOT).replaceFirst("^worker_", "");
    }

    /** Adds the series of every model, at 0 if they are new. */
    static void begin() {
        forEachModel(model -> {
            QUEUE.labels(model.getModelName(), model.getVersion());
            REQUEST.labels(model.getModelName(), model.getVersion());
            for (String code : USUAL_CODES) {
                RESPONSES.labels(model.getModelName(), model.getVersion(), code);
            }
        });
    }

    private static GaugeMetricFamily family(String name, String help) {
        return new GaugeMetricFamily(name, help, List.of(MODEL));
    }
}
