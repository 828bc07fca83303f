package damoyolo.frontend;

import com.google.gson.JsonObject;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponseStatus;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.CompletableFuture;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * Liveness and readiness at the addresses of the Open Inference Protocol, about the default version of each model.
 * TorchServe's own answers there are constants, and its /ping is true while no worker runs.
 */
final class Health {
    static final String PREFIX = "/v2/health/";

    private Health() {}

    /** Answers a question about health, at once or within front_end_health_timeout_s; false for other requests. */
    static boolean answer(ChannelHandlerContext context, FullHttpRequest request, String path) {
        if (!path.equals(PREFIX + "live") && !path.equals(PREFIX + "ready")) {
            return false;
        }
        InferenceProtocol.requireMethod(request, HttpMethod.GET, HttpMethod.HEAD);
        if (path.endsWith("live")) {
            send(context, "live", failuresOfLiveness(), null);
        } else {
            answerReady(context);
        }
        return true;
    }

    private static Map<String, String> failuresOfLiveness() {
        Map<String, String> failures = new TreeMap<>();
        models().forEach((name, model) -> {
            if (ModelHealth.of(model).isGivenUp()) {
                failures.put(name, "its workers failed for longer than maxRetryTimeoutInSec and are not started again");
            }
        });
        return failures;
    }

    private static void answerReady(ChannelHandlerContext context) {
        Map<String, Model> models = models();
        if (Drain.isDraining() || models.isEmpty()) {
            send(context, "ready", Map.of(), Drain.isDraining() ? Drain.WHY_NOT_READY : "no model is registered");
            return;
        }
        Map<String, CompletableFuture<String>> reasons = new TreeMap<>();
        models.forEach((name, model) -> reasons.put(name, ModelHealth.of(model).whyNotReady()));
        CompletableFuture.allOf(reasons.values().toArray(new CompletableFuture<?>[0])).thenRun(() -> {
            Map<String, String> failures = new TreeMap<>();
            reasons.forEach((name, reason) -> {
                if (reason.join() != null) {
                    failures.put(name, reason.join());
                }
            });
            send(context, "ready", failures, null);
        });
    }

    private static Map<String, Model> models() {
        return ModelManager.getInstance().getDefaultModels();
    }

    private static void send(ChannelHandlerContext context, String question, Map<String, String> failures, String reason) {
        boolean isTrue = failures.isEmpty() && reason == null;
        JsonObject answer = new JsonObject();
        answer.addProperty(question, isTrue);
        if (reason != null) {
            answer.addProperty("reason", reason);
        }
        if (!failures.isEmpty()) {
            JsonObject models = new JsonObject();
            failures.forEach(models::addProperty);
            answer.add("models", models);
        }
        NettyUtils.sendJsonResponse(
                context, answer.toString(), isTrue ? HttpResponseStatus.OK : HttpResponseStatus.SERVICE_UNAVAILABLE);
    }
}
