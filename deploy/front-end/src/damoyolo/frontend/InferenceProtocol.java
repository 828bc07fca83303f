package damoyolo.frontend;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import io.netty.buffer.Unpooled;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.regex.Pattern;
import org.pytorch.serve.http.MethodNotAllowedException;
import org.pytorch.serve.util.JsonUtils;

/**
 * Predictions at the addresses of the Open Inference Protocol v2, and errors as that protocol and KServe v1 have
 * them. TorchServe answers an address with a version 404, and accepts every method at the others.
 */
final class InferenceProtocol {
    /** Tells the handler that only a request of the protocol is accepted (handler/damoyolo/inference_request.py). */
    private static final String HEADER = "X-Inference-Protocol";
    private static final int MAX_ERROR_BYTES = 65_536;
    private static final Pattern V1_PREDICTION = Pattern.compile(".*:(predict|explain)", Pattern.DOTALL);
    private static final Pattern ADDRESS = Pattern.compile("/v[12](/.*)?", Pattern.DOTALL);

    private InferenceProtocol() {}

    /** The segments of the address as TorchServe shall read them: those of /predictions for a prediction. */
    static String[] route(FullHttpRequest request, String[] segments) {
        if (segments.length == 4 && segments[1].equals("v1") && segments[2].equals("models")
                && V1_PREDICTION.matcher(segments[3]).matches()) {
            requireMethod(request, HttpMethod.POST, HttpMethod.PUT);
            return segments; // TorchServe has this address
        }
        boolean hasVersion = segments.length == 7 && segments[4].equals("versions");
        if (!hasVersion && segments.length != 5 || !segments[1].equals("v2") || !segments[2].equals("models")
                || !segments[segments.length - 1].equals("infer")) {
            return segments;
        }
        requireMethod(request, HttpMethod.POST);
        request.headers().set(HEADER, "v2");
        return hasVersion
                ? new String[] {"", "predictions", segments[3], segments[5]}
                : new String[] {"", "predictions", segments[3]};
    }

    static void requireMethod(FullHttpRequest request, HttpMethod... accepted) {
        if (!List.of(accepted).contains(request.method())) {
            throw new MethodNotAllowedException();
        }
    }

    /** The path as requests are routed by it: decoded, or as it is if it cannot be decoded. */
    static String pathOf(String uri) {
        try {
            return new QueryStringDecoder(uri).path();
        } catch (IllegalArgumentException error) {
            return uri;
        }
    }

    /** Whether errors at this path have the form of the protocols. */
    static boolean isAddress(String path) {
        return ADDRESS.matcher(path).matches();
    }

    /** The answer with {"error": message} in place of an error of TorchServe or of the handler; others stay. */
    static FullHttpResponse withError(FullHttpResponse response) {
        String message = messageOf(response);
        if (message == null) {
            return response;
        }
        JsonObject error = new JsonObject();
        error.addProperty("error", message);
        FullHttpResponse answer = response.replace(Unpooled.copiedBuffer(error.toString(), StandardCharsets.UTF_8));
        answer.headers().setInt(HttpHeaderNames.CONTENT_LENGTH, answer.content().readableBytes());
        response.release();
        return answer;
    }

    private static String messageOf(FullHttpResponse response) {
        if (response.content().readableBytes() > MAX_ERROR_BYTES) {
            return null;
        }
        try {
            JsonElement body = JsonUtils.GSON.fromJson(response.content().toString(StandardCharsets.UTF_8), JsonElement.class);
            JsonElement message = body != null && body.isJsonObject() ? body.getAsJsonObject().get("message") : null;
            return message != null && message.isJsonPrimitive() ? message.getAsString() : null;
        } catch (JsonParseException error) {
            return null; // no JSON
        }
    }
}
