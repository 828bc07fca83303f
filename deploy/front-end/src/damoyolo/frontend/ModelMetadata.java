package damoyolo.frontend;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponseStatus;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.CompletableFuture;
import java.util.function.Function;
import java.util.regex.Pattern;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * What the server and its models are, and whether a model is ready, at the addresses of the Open Inference Protocol v2
 * and of KServe v1. TorchServe knows names, versions and workers, and has none of these addresses.
 */
final class ModelMetadata {
    /** As handler/damoyolo/inference_answer.py has them. */
    private static final List<Tensor> OUTPUTS = List.of(
            new Tensor("counts", "INT64", -1), new Tensor("boxes", "FP32", -1, 4), new Tensor("scores", "FP32", -1),
            new Tensor("class_ids", "INT64", -1), new Tensor("labels", "BYTES", -1));
    private static final List<Tensor> INPUTS = List.of(new Tensor("image", "BYTES", -1));
    private static final Set<String> QUESTIONS = Set.of("", "ready", "config");
    /** Of the models with these tensors; what others take and give is not known here. */
    private static final String HANDLER = "damoyolo_handler.py";
    private static final String PLATFORM = "torchserve";
    private static final Pattern READINESS =
            Pattern.compile("/v2/models/[^/]+(/versions/[^/]+)?/ready|/v1/models/[^/:]+");

    private ModelMetadata() {}

    /** Whether a request of this path asks whether a model is ready. */
    static boolean isReadiness(String path) {
        return READINESS.matcher(path).matches();
    }

    /** Answers a question about the server or a model, readiness as Health does; false for other requests. */
    static boolean answer(ChannelHandlerContext context, FullHttpRequest request, String[] segments) throws ModelException {
        if (segments.length < 2) { // "/" has none
            return false;
        }
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
        } else if (isV2) {
            return answerAboutModel(context, request, segments);
        } else if (segments.length == 4 && segments[3].indexOf(':') < 0) {
            requireRead(request);
            answerReady(context, model(segments[3], null));
        } else {
            return false;
        }
        return true;
    }

    /** Answers /v2/models/NAME and /v2/models/NAME/versions/VERSION, and ready and config below them. */
    private static boolean answerAboutModel(ChannelHandlerContext context, FullHttpRequest request, String[] segments)
            throws ModelException {
        boolean hasVersion = segments.length > 5 && segments[4].equals("versions");
        int end = hasVersion ? 6 : 4;
        String question = segments.length == end ? "" : segments[end];
        if (segments.length > end + 1 || !QUESTIONS.contains(question)) {
            return false;
        }
        requireRead(request);
        Model model = model(segments[3], hasVersion ? segments[5] : null);
        if (question.equals("ready")) {
            answerReady(context, model);
        } else {
            send(context, question.isEmpty() ? metadata(model) : configuration(model));
        }
        return true;
    }

    private static void requireRead(FullHttpRequest request) {
        InferenceProtocol.requireMethod(request, HttpMethod.GET, HttpMethod.HEAD);
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
        extensions.add("model_configuration");
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
        JsonObject answer = new JsonObject();
        answer.addProperty("name", model.getModelName());
        answer.add("versions", sorted);
        answer.addProperty("platform", PLATFORM);
        answer.add("inputs", array(model, INPUTS, Tensor::described));
        answer.add("outputs", array(model, OUTPUTS, Tensor::described));
        return answer;
    }

    /** The part of Triton's model configuration that its perf_analyzer reads. */
    private static JsonObject configuration(Model model) {
        JsonObject answer = new JsonObject();
        answer.addProperty("name", model.getModelName());
        answer.addProperty("platform", PLATFORM);
        answer.addProperty("max_batch_size", 0); // a request is not part of a batch that its client makes
        answer.add("input", array(model, INPUTS, Tensor::configured));
        answer.add("output", array(model, OUTPUTS, Tensor::configured));
        return answer;
    }

    private static JsonArray array(Model model, List<Tensor> tensors, Function<Tensor, JsonObject> form) {
        JsonArray answer = new JsonArray();
        if (HANDLER.equals(model.getModelArchive().getManifest().getModel().getHandler())) {
            tensors.forEach(tensor -> answer.add(form.apply(tensor)));
        }
        return answer;
    }

    private static void answerReady(ChannelHandlerContext context, Model model) {
        CompletableFuture<String> reason = Drain.isDraining()
                ? CompletableFuture.completedFuture(Drain.WHY_NOT_READY)
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

    /** A tensor of the protocol. */
    private static final class Tensor {
        private final String name;
        private final String datatype;
        private final int[] shape;

        Tensor(String name, String datatype, int... shape) {
            this.name = name;
            this.datatype = datatype;
            this.shape = shape;
        }

        JsonObject described() {
            return json("datatype", datatype, "shape");
        }

        JsonObject configured() {
            return json("data_type", "TYPE_" + (datatype.equals("BYTES") ? "STRING" : datatype), "dims");
        }

        private JsonObject json(String typeField, String type, String shapeField) {
            JsonArray sizes = new JsonArray();
            Arrays.stream(shape).forEach(sizes::add);
            JsonObject answer = new JsonObject();
            answer.addProperty("name", name);
            answer.addProperty(typeField, type);
            answer.add(shapeField, sizes);
            return answer;
        }
    }
}
