package damoyolo.frontend;

import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import org.pytorch.serve.ModelServer;
import org.pytorch.serve.grpcimpl.GRPCInterceptor;
import org.pytorch.serve.http.api.rest.PrometheusMetricsRequestHandler;
import org.pytorch.serve.servingsdk.ModelServerEndpoint;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.ModelManager;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Puts the classes of this package into TorchServe's HTTP and gRPC front end.
 *
 * <p>TorchServe creates the endpoints of its plugins (`plugins_path` in config.properties) before it opens a
 * port. This one serves no path (it has no annotation that names one). It only uses the moment: the classes
 * that build the front end are not loaded yet, so they can be loaded with a class of this package in place of
 * one of TorchServe's. An agent (`-javaagent`) could do the same, but needs the module java.instrument and
 * keeps Java from starting where that or the jar is missing.
 */
public final class FrontEnd extends ModelServerEndpoint {
    private static final Logger LOGGER = LoggerFactory.getLogger(FrontEnd.class);
    private static final AtomicBoolean INSTALLED = new AtomicBoolean();
    private static final long SWEEP_MS = 250;
    static final ScheduledExecutorService SCHEDULER = Executors.newSingleThreadScheduledExecutor(FrontEnd::daemon);

    /** Called by the ServiceLoader, once for each kind of endpoint. */
    public FrontEnd() {
        if (!INSTALLED.compareAndSet(false, true)) {
            return;
        }
        try {
            Setting.readAll();
        } catch (IllegalArgumentException error) {
            System.out.println("Invalid configuration: " + error.getMessage()); // as TorchServe's own
            System.exit(1);
        }
        try {
            install();
        } catch (ReflectiveOperationException | LinkageError | RuntimeException error) {
            LOGGER.warn("This TorchServe is not the version that deploy/front-end was written for; its front "
                    + "end stays as it is, or partly so. Reason: {}", error.toString());
        }
    }

    private static void install() throws ReflectiveOperationException {
        String serve = "org/pytorch/serve/";
        Map<ClassPatch, Class<?>> patches = new LinkedHashMap<>();
        Map<String, Class<?>> job = Map.of(serve + "job/RestJob", HttpJob.class);
        patches.put(new ClassPatch(serve + "util/ApiUtils", job), NettyUtils.class);
        patches.put(
                new ClassPatch(serve + "http/api/rest/ManagementRequestHandler", job), PrometheusMetricsRequestHandler.class);
        // After the handlers, which it names.
        patches.put(
                new ClassPatch(serve + "ServerInitializer", Map.of(
                        serve + "http/HttpRequestHandler", RequestHandler.class,
                        serve + "http/api/rest/PrometheusMetricsRequestHandler", MetricsPage.class)),
                ModelServer.class);
        // By name: the class extends InferenceImpl, which must not be loaded before it is patched.
        patches.put(
                new ClassPatch(serve + "grpcimpl/GRPCServiceFactory", Map.of(
                        serve + "grpcimpl/InferenceImpl", GrpcService.class,
                        serve + "grpcimpl/ManagementImpl", GrpcManagement.class)),
                GRPCInterceptor.class);
        // After the service, whose calls its jobs read.
        patches.put(
                new ClassPatch(serve + "grpcimpl/InferenceImpl", Map.of(serve + "job/GRPCJob", GrpcJob.class)),
                GRPCInterceptor.class);
        ModelQueue.require();
        ServerMetrics.require();
        GrpcLog.limit();
        // Every patch was made and checked before the first is used, so a TorchServe that looks different keeps all
        // its classes. What remains is a class that is loaded already: then those defined before it stay.
        for (Map.Entry<ClassPatch, Class<?>> patch : patches.entrySet()) {
            patch.getKey().defineBeside(patch.getValue());
        }
        Drain.handleSignal();
        SCHEDULER.scheduleWithFixedDelay(FrontEnd::sweep, SWEEP_MS, SWEEP_MS, TimeUnit.MILLISECONDS);
    }

    private static void sweep() {
        ModelManager manager = ModelManager.getInstance();
        if (manager != null) { // null while the server starts
            attempt(PendingJob::sweep);
            attempt(() -> ModelHealth.sweep(manager));
        }
    }

    /** Whatever is thrown, OutOfMemoryError included, would end the schedule, and with it every time limit. */
    static void attempt(Runnable task) {
        try {
            task.run();
        } catch (Throwable error) {
            try {
                LOGGER.warn("Open requests could not be checked because of {}", ErrorAnswer.describe(error));
            } catch (Throwable again) {
                // No memory to say so.
            }
        }
    }

    private static Thread daemon(Runnable task) {
        Thread thread = new Thread(task, "front-end");
        thread.setDaemon(true);
        return thread;
    }
}
