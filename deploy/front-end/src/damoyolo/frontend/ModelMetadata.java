package damoyolo.frontend;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponseStatus;
import java.util.Map;
import java.util.TreeSet;
import java.util.concurrent.CompletableFuture;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.http.MethodNotAllowedException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * What the server and its models are, and whether a model is ready, at the addresses of the Open Inference Protocol v2
 * and of KServe v1. TorchServe knows names, versions and workers, and has none of these addresses.
 */
final class ModelMetadata {
    /** Names, datatypes and shapes of the tensors, as handler/damoyolo/inference_answer.py has them. */
    private static final Object[][] OUTPUTS = {
        {"counts", "INT64", -1}, {"boxes", "FP32", -1, 4}, {"scores", "FP32", -1}, {"class_ids", "INT64", -1}, {"labels", "BYTES", -1},
    };
    private static final Object[][] INPUTS = {{"image", "BYTES", -1}};
    private static final Object[][] NONE = {};
    /** Of the models with these tensors; what others take and give is not known here. */
    private static final String HANDLER = "damoyolo_handler.py";

    private ModelMetadata() {}

    /** Answers a question about the server or a model, readiness as Health does; false for other requests. */
    static boolean answer(ChannelHandlerContext context, FullHttpRequest request, String[] segments) throws ModelException {
        boolean isV2 = segments[1].equals("v2");
        if (!isV2 && !segments[1].equals("v1") || segments.length > 2 && !segments[2].equals("models")) {
            return false;
        }
        if (segments.length == 2 && isV2) {
            requireRead(request);
            send(context, server());
        } else if (segments.length == 3) {
            requireRead(request);
            send(context, models());
        } else if (isV2 && isQuestion(segments)) {
            requireRead(request);
            Model model = model(segments[3], segments.length > 5 ? segments[5] : null);
            if (segments[segments.length - 1].equals("ready") && segments.length % 2 == 1) {
                answerReady(context, model);
            } else {
                send(context, metadata(model));
            }
        } else if (!isV2 && segments.length == 4 && segments[3].indexOf(':') < 0) {
            requireRead(request);
            answerReady(context, model(segments[3], null));
        } else {
            return false;
        }
        return true;
    }

    /** Whether the address is /v2/models/NAME, /v2/models/NAME/versions/VERSION, or /ready below one of these. */
    private static boolean isQuestion(String[] segments) {
        switch (segments.length) {
            case 4:
                return true;
            case 5:
                return segments[4].equals("ready");
            case 6:
                return segments[4].equals("versions");
            default:
                return segments.length == 7 && segments[4].equals("versions") && segments[6].equals("ready");
        }
    }

    private static void requireRead(FullHttpRequest request) {
        if (!HttpMethod.GET.equals(request.method()) && !HttpMethod.HEAD.equals(request.method())) {
            throw new MethodNotAllowedException();
        }
    }

    private static Model model(String name, String version) throws ModelException {
        Model model = ModelManager.getInstance().getModel(name, version);
        if (model == null) {
            throw new ModelNotFoundException("Model not found: " + name);
        }
        return model;
    }

    private static JsonObject server() {
        JsonObject answer = new JsonObject();
        answer.addProperty("name", "damoyolo-torchserve");
        answer.addProperty("version", ConfigManager.getInstance().getVersion());
        JsonArray extensions = new JsonArray();
        extensions.add("binary_tensor_data");
        answer.add("extensions", extensions);
        return answer;
    }

    private static JsonObject models() {
        JsonArray names = new JsonArray();
        new TreeSet<>(ModelManager.getInstance().getDefaultModels().keySet()).forEach(names::add);
        JsonObject answer = new JsonObject();
        answer.add("models", names);
        return answer;
    }

    private static JsonObject metadata(Model model) throws ModelException {
        TreeSet<String> versions = new TreeSet<>();
        for (Map.Entry<String, Model> version : ModelManager.getInstance().getAllModelVersions(model.getModelName())) {
            versions.add(version.getKey());
        }
        JsonArray sorted = new JsonArray();
        versions.forEach(sorted::add);
        boolean isKnown = HANDLER.equals(model.getModelArchive().getManifest().getModel().getHandler());
        JsonObject answer = new JsonObject();
        answer.addProperty("name", model.getModelName());
        answer.add("versions", sorted);
        answer.addProperty("platform", "torchserve");
        answer.add("inputs", tensors(isKnown ? INPUTS : NONE));
        answer.add("outputs", tensors(isKnown ? OUTPUTS : NONE));
        return answer;
    }

    private static JsonArray tensors(Object[][] tensors) {
        JsonArray answer = new JsonArray();
        for (Object[] tensor : tensors) {
            JsonArray shape = new JsonArray();
            for (int index = 2; index < tensor.length; index++) {
                shape.add((Integer) tensor[index]);
            }
            JsonObject one = new JsonObject();
            one.addProperty("name", (String) tensor[0]);
            one.addProperty("datatype", (String) tensor[1]);
            one.add("shape", shape);
            answer.add(one);
        }
        return answer;
    }

    private static void answerReady(ChannelHandlerContext context, Model model) {
        CompletableFuture<String> reason = Drain.isDraining()
                ? CompletableFuture.completedFuture("the server is about to end")
                : ModelHealth.of(model).whyNotReady();
        reason.thenAccept(why -> {
            JsonObject answer = new JsonObject();
            answer.addProperty("name", model.getModelName());
            answer.addProperty("ready", why == null);
            if (why != null) {
                answer.addProperty("reason", why);
            }
            NettyUtils.sendJsonResponse(
                    context, answer.toString(), why == null ? HttpResponseStatus.OK : HttpResponseStatus.SERVICE_UNAVAILABLE);
        });
    }

    private static void send(ChannelHandlerContext context, JsonObject answer) {
        NettyUtils.sendJsonResponse(context, answer.toString(), HttpResponseStatus.OK);
    }
}
