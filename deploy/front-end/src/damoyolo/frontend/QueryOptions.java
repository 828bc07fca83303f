package damoyolo.frontend;

import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.regex.Pattern;
import org.pytorch.serve.http.BadRequestException;

/**
 * Passes the query string of the prediction paths on as request headers: `?score_threshold=0.5` as
 * `X-Detect-Score-Threshold: 0.5`. TorchServe drops it there (not at `/models/NAME/invoke`). As in a form, the
 * last value of a name counts, and it takes precedence over a header.
 */
final class QueryOptions {
    private static final Set<String> PATHS_WITHOUT_QUERY = Set.of("predictions", "v1");
    private static final Pattern NAME = Pattern.compile("[A-Za-z0-9_]{1,64}");
    private static final Pattern VALUE = Pattern.compile("\\P{Cntrl}*");

    private QueryOptions() {}

    static void moveToHeaders(FullHttpRequest request, QueryStringDecoder uri, String[] segments) {
        if (segments.length < 3 || !PATHS_WITHOUT_QUERY.contains(segments[1])) {
            return;
        }
        for (Map.Entry<String, List<String>> parameter : uri.parameters().entrySet()) {
            String name = parameter.getKey();
            String value = parameter.getValue().get(parameter.getValue().size() - 1);
            if (!NAME.matcher(name).matches() || !VALUE.matcher(value).matches()) {
                throw new BadRequestException(
                        "The query string has a name other than letters, digits and _, or a value with control characters.");
            }
            request.headers().set("X-Detect-" + name.replace('_', '-'), value);
        }
    }
}
