package damoyolo.frontend;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import io.netty.buffer.Unpooled;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpMethod;
import java.nio.charset.StandardCharsets;
import org.pytorch.serve.http.MethodNotAllowedException;
import org.pytorch.serve.util.JsonUtils;

/**
 * Predictions at the addresses of the Open Inference Protocol v2, and errors as that protocol and KServe v1 have
 * them. TorchServe answers an address with a version 404, and accepts every method at the other one.
 */
final class InferenceProtocol {
    /** Tells the handler that only a request of the protocol is accepted (handler/damoyolo/inference_request.py). */
    private static final String HEADER = "X-Inference-Protocol";
    private static final int MAX_ERROR_BYTES = 65_536;

    private InferenceProtocol() {}

    /** The segments of the address as TorchServe shall read them: those of /predictions for a prediction. */
    static String[] route(FullHttpRequest request, String[] segments) {
        boolean hasVersion = segments.length == 7 && segments[4].equals("versions");
        if (!hasVersion && segments.length != 5 || !segments[1].equals("v2") || !segments[2].equals("models")
                || !segments[segments.length - 1].equals("infer")) {
            return segments;
        }
        if (!HttpMethod.POST.equals(request.method())) {
            throw new MethodNotAllowedException();
        }
        request.headers().set(HEADER, "v2");
        return hasVersion
                ? new String[] {"", "predictions", segments[3], segments[5]}
                : new String[] {"", "predictions", segments[3]};
    }

    /** Whether errors at this address have the form of the protocols. */
    static boolean isAddress(String uri) {
        return uri.startsWith("/v2/") || uri.startsWith("/v1/");
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
