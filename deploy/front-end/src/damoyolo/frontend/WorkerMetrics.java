package damoyolo.frontend;

import io.prometheus.client.Collector.MetricFamilySamples;
import io.prometheus.client.Collector.MetricFamilySamples.Sample;
import io.prometheus.client.Collector.Type;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.pytorch.serve.wlm.ModelManager;

/**
 * The metrics that workers report (handler/damoyolo/metrics.py) as Prometheus expects them: a histogram in place of the
 * three counters that TorchServe knows, a text that explains each, no label that is equal everywhere, names and versions
 * in full, and no series of versions and workers that are gone.
 */
final class WorkerMetrics {
    private static final String PREFIX = "damoyolo_";
    private static final Pattern PART_OF_HISTOGRAM = Pattern.compile("(damoyolo_\\w+)_(?:bucket|sum|count)");
    /** In a name or version, as in metrics.py. */
    private static final Pattern NOT_SENT = Pattern.compile("[^A-Za-z0-9_.+-]");
    private static final String BOUND = "le";
    /** TorchServe adds it to what workers report; Prometheus has a label `instance` of its own. */
    private static final String HOST = "Hostname";
    private static final Map<String, String> HELP = Map.ofEntries(
            Map.entry("damoyolo_requests_total", "Requests that workers answered, errors included."),
            Map.entry("damoyolo_request_errors_total", "Requests that workers refused or failed at, by type and status of the answer."),
            Map.entry("damoyolo_images_total", "Images that were decoded, by the processor that decoded them."),
            Map.entry("damoyolo_detections_total", "Detections in all images."),
            Map.entry("damoyolo_worker_starts_total", "Workers that loaded the model, restarts included."),
            Map.entry("damoyolo_batch_size", "Requests of a batch."),
            Map.entry("damoyolo_worker_request_duration_seconds", "Time of a request in the worker, from its batch's arrival to the answers."),
            Map.entry("damoyolo_stage_duration_seconds", "Time of a stage for a whole batch; on a GPU, of its work there."),
            Map.entry("damoyolo_worker_start_time_seconds", "Unix time at which the process of the worker was started."),
            Map.entry("damoyolo_worker_load_duration_seconds", "Time from the start of the process until it was ready."),
            Map.entry("damoyolo_worker_gpu_memory_bytes", "Memory of the GPU that PyTorch holds in the worker."),
            Map.entry("damoyolo_gpu_memory_used_bytes", "Used memory of the GPU, by whatever process."),
            Map.entry("damoyolo_gpu_memory_capacity_bytes", "Memory of the GPU."));

    /** Name and version of each model, by both as workers send them. */
    private final Map<List<String>, List<String>> models = new HashMap<>();
    private final Set<String> workers = new HashSet<>();

    WorkerMetrics() {
        ServerMetrics.forEachModel(model -> {
            models.put(List.of(sent(model.getModelName()), sent(model.getVersion())),
                    List.of(model.getModelName(), model.getVersion()));
            ModelManager.getInstance().getWorkers(model.getModelVersionName())
                    .forEach(worker -> workers.add(worker.getWorkerId()));
        });
    }

    private static String sent(String text) {
        return text.isEmpty() ? "unknown" : NOT_SENT.matcher(text).replaceAll("_");
    }

    /** The families of the registry, those of other origin unchanged. */
    List<MetricFamilySamples> arrange(List<MetricFamilySamples> registered) {
        List<MetricFamilySamples> arranged = new ArrayList<>();
        Map<String, List<Sample>> histograms = new LinkedHashMap<>();
        for (MetricFamilySamples family : registered) {
            Matcher part = PART_OF_HISTOGRAM.matcher(family.name);
            if (!family.name.startsWith(PREFIX)) {
                arranged.add(family);
            } else if (family.type == Type.COUNTER && part.matches()) {
                histograms.computeIfAbsent(part.group(1), name -> new ArrayList<>()).addAll(present(family));
            } else {
                add(arranged, family.name, family.type, family.help, present(family));
            }
        }
        histograms.forEach((name, samples) -> add(arranged, name, Type.HISTOGRAM, "", inOrder(samples)));
        return arranged;
    }

    /**
     * The samples of a histogram, each with its buckets from small to large. They are read while workers write them:
     * none of the buckets may have less than a smaller one, and the count is that of the largest.
     */
    private static List<Sample> inOrder(List<Sample> samples) {
        Map<List<String>, List<Sample>> byLabels = new LinkedHashMap<>();
        for (Sample sample : samples) {
            List<String> labels = new ArrayList<>(sample.labelValues);
            int bound = sample.labelNames.indexOf(BOUND);
            if (bound >= 0) {
                labels.remove(bound);
            }
            byLabels.computeIfAbsent(labels, key -> new ArrayList<>()).add(sample);
        }
        List<Sample> ordered = new ArrayList<>();
        for (List<Sample> histogram : byLabels.values()) {
            histogram.sort(Comparator.comparingDouble(WorkerMetrics::boundOf)); // _count and _sum come last
            double most = 0;
            for (Sample sample : histogram) {
                if (sample.name.endsWith("_bucket")) {
                    most = Math.max(most, sample.value);
                }
                boolean isSum = sample.name.endsWith("_sum");
                ordered.add(isSum ? sample : new Sample(sample.name, sample.labelNames, sample.labelValues, most));
            }
        }
        return ordered;
    }

    /** Of a sample without a bound, one behind all others: Java sorts NaN behind infinity. */
    private static double boundOf(Sample sample) {
        int bound = sample.labelNames.indexOf(BOUND);
        if (bound < 0) {
            return Double.NaN;
        }
        String text = sample.labelValues.get(bound);
        return text.equals("+Inf") ? Double.POSITIVE_INFINITY : Double.parseDouble(text);
    }

    private static void add(List<MetricFamilySamples> to, String name, Type type, String help, List<Sample> samples) {
        if (!samples.isEmpty()) {
            to.add(new MetricFamilySamples(name, type, HELP.getOrDefault(name, help), samples));
        }
    }

    private List<Sample> present(MetricFamilySamples family) {
        List<Sample> samples = new ArrayList<>();
        for (Sample sample : family.samples) {
            List<String> names = new ArrayList<>(sample.labelNames);
            List<String> values = new ArrayList<>(sample.labelValues);
            int host = names.indexOf(HOST);
            if (host >= 0) {
                names.remove(host);
                values.remove(host);
            }
            int model = names.indexOf("model_name");
            int version = names.indexOf("model_version");
            int worker = names.indexOf("worker_id");
            boolean isPresent = worker < 0 || workers.contains(values.get(worker));
            if (model >= 0 && version >= 0) {
                List<String> full = models.get(List.of(values.get(model), values.get(version)));
                isPresent = isPresent && full != null;
                if (isPresent) {
                    values.set(model, full.get(0));
                    values.set(version, full.get(1));
                }
            }
            if (isPresent) {
                samples.add(new Sample(sample.name, names, values, sample.value));
            }
        }
        return samples;
    }
}
