package damoyolo.frontend;

import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.atomic.AtomicBoolean;
import org.pytorch.serve.ModelServer;
import org.pytorch.serve.grpcimpl.GRPCInterceptor;
import org.pytorch.serve.servingsdk.ModelServerEndpoint;
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

    /** Called by the ServiceLoader, once for each kind of endpoint. */
    public FrontEnd() {
        if (!INSTALLED.compareAndSet(false, true)) {
            return;
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
        patches.put(
                new ClassPatch(serve + "ServerInitializer", serve + "http/HttpRequestHandler", RequestHandler.class),
                ModelServer.class);
        // By name: the class extends InferenceImpl, which must not be loaded before it is patched.
        patches.put(
                new ClassPatch(serve + "grpcimpl/GRPCServiceFactory", serve + "grpcimpl/InferenceImpl", GrpcService.class),
                GRPCInterceptor.class);
        // After the service, whose metadata its jobs read.
        patches.put(
                new ClassPatch(serve + "grpcimpl/InferenceImpl", serve + "job/GRPCJob", GrpcJob.class),
                GRPCInterceptor.class);
        GrpcLog.limit();
        // Every patch was made and checked before the first is used, so a TorchServe that looks different keeps all
        // its classes. What remains is a class that is loaded already: then those defined before it stay.
        for (Map.Entry<ClassPatch, Class<?>> patch : patches.entrySet()) {
            patch.getKey().defineBeside(patch.getValue());
        }
    }
}
