package damoyolo.frontend;

import com.google.gson.JsonParseException;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.regex.Pattern;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.http.messages.RegisterModelRequest;
import org.pytorch.serve.util.JsonUtils;

/**
 * Refuses to register what is no archive of the model store. TorchServe's allowed_urls does not apply to paths: it
 * runs the handler of any folder that `url` names, and `handler` replaces the archive's own by any function.
 */
final class Registration {
    private static final String NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,99}";
    private static final Pattern MODEL_NAME = Pattern.compile(NAME);
    private static final Pattern ARCHIVE = Pattern.compile(NAME + "\\.mar");
    private static final List<String> PARAMETERS = List.of("url", "model_name", "handler");

    private Registration() {}

    /** Checks `POST /models` and refuses `POST /workflows`; other requests pass. */
    static void check(FullHttpRequest request, QueryStringDecoder uri, String[] segments) {
        if (!HttpMethod.POST.equals(request.method()) || segments.length != 2) { // "/" has none
            return;
        }
        if (segments[1].equals("models")) {
            RegisterModelRequest wanted = isJson(request)
                    ? fromJson(request, RegisterModelRequest.class)
                    : new RegisterModelRequest(requireSingle(uri));
            check(wanted);
        } else if (segments[1].equals("workflows")) {
            // TorchServe registers them with the model API off as well.
            throw new BadRequestException("Workflows are not served here.");
        }
    }

    /** The same for a request that has been parsed. */
    static void check(RegisterModelRequest wanted) {
        check(wanted.getModelUrl(), wanted.getModelName(), wanted.getHandler());
    }

    private static void check(String url, String name, String handler) {
        if (url == null || !ARCHIVE.matcher(url).matches()) {
            throw new BadRequestException("The parameter url is " + (url == null ? "missing" : "something else")
                    + "; only the file name of an archive in the model store is accepted (letters, digits, ., _ and -, "
                    + "ending in .mar), because an archive is code that the server runs.");
        }
        if (name != null && !MODEL_NAME.matcher(name).matches()) {
            throw new BadRequestException("The name of the model has other characters than letters, digits, ., _ and -, "
                    + "or more than 100.");
        }
        if (handler != null && !handler.isEmpty()) {
            throw new BadRequestException("The parameter handler is not accepted, because it makes the server run other code than "
                    + "that of the archive; set the handler when the archive is built.");
        }
    }

    private static boolean isJson(FullHttpRequest request) { // as TorchServe's ManagementRequestHandler
        return HttpHeaderValues.APPLICATION_JSON.contentEqualsIgnoreCase(HttpUtil.getMimeType(request));
    }

    private static <T> T fromJson(FullHttpRequest request, Class<T> type) {
        T parsed;
        try {
            parsed = JsonUtils.GSON.fromJson(request.content().toString(StandardCharsets.UTF_8), type);
        } catch (JsonParseException error) {
            parsed = null;
        }
        if (parsed == null) {
            throw new BadRequestException("The body is not a JSON object with the parameters of the registration.");
        }
        return parsed;
    }

    private static QueryStringDecoder requireSingle(QueryStringDecoder uri) {
        for (String name : PARAMETERS) {
            if (uri.parameters().getOrDefault(name, List.of()).size() > 1) {
                throw new BadRequestException("The parameter " + name + " is given more than once.");
            }
        }
        return uri;
    }
}
