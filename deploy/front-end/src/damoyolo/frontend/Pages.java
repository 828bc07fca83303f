package damoyolo.frontend;

import io.netty.buffer.ByteBufUtil;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaders;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpVersion;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Locale;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.ModelManager;

/**
 * What people and tools look for on the port for inference: at / the page of the model, which the model itself serves
 * at its prediction address, and at /openapi.json the description of the API.
 */
final class Pages {
    private static final String DESCRIPTION = "/openapi.json";

    private Pages() {}

    /** Answers at these two addresses; false for other requests. */
    static boolean answer(ChannelHandlerContext context, FullHttpRequest request, String path) {
        if (path.equals(DESCRIPTION)) {
            InferenceProtocol.requireMethod(request, HttpMethod.GET, HttpMethod.HEAD);
            NettyUtils.sendJsonResponse(context, Description.TEXT, HttpResponseStatus.OK);
            return true;
        }
        boolean isRead = HttpMethod.GET.equals(request.method()) || HttpMethod.HEAD.equals(request.method());
        if (!path.equals("/") || !isRead || !acceptsHtml(request.headers())) {
            return false;
        }
        List<String> addresses = new TreeSet<>(ModelManager.getInstance().getDefaultModels().keySet()).stream()
                .map(name -> "predictions/" + URLEncoder.encode(name, StandardCharsets.UTF_8).replace("+", "%20"))
                .collect(Collectors.toList());
        NettyUtils.sendHttpResponse(context, addresses.size() == 1 ? redirect(addresses.get(0)) : list(addresses), true);
        return true;
    }

    private static boolean acceptsHtml(HttpHeaders headers) {
        return headers.getAll(HttpHeaderNames.ACCEPT).stream()
                .flatMap(value -> Stream.of(value.split(",")))
                .anyMatch(entry -> entry.split(";", 2)[0].strip().toLowerCase(Locale.ROOT).equals("text/html"));
    }

    /** To an address beside this one, so that a proxy may serve both in a folder of its own. */
    private static FullHttpResponse redirect(String address) {
        FullHttpResponse answer = new DefaultFullHttpResponse(HttpVersion.HTTP_1_1, HttpResponseStatus.FOUND);
        answer.headers().set(HttpHeaderNames.LOCATION, address);
        answer.headers().set(HttpHeaderNames.VARY, HttpHeaderNames.ACCEPT);
        return answer;
    }

    /** The addresses are encoded, so they hold nothing that HTML would read as its own. */
    private static FullHttpResponse list(List<String> addresses) {
        String links = addresses.stream()
                .map(address -> "<li><a href=\"" + address + "\">" + address + "</a></li>\n")
                .collect(Collectors.joining());
        FullHttpResponse answer = new DefaultFullHttpResponse(HttpVersion.HTTP_1_1, HttpResponseStatus.OK);
        ByteBufUtil.writeAscii(answer.content(), "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">"
                + "<meta name=\"color-scheme\" content=\"light dark\"><title>Models</title>\n"
                + "<h1>" + (addresses.isEmpty() ? "No model is registered" : "Models") + "</h1>\n<ul>\n" + links + "</ul>\n");
        answer.headers().set(HttpHeaderNames.CONTENT_TYPE, "text/html; charset=utf-8");
        answer.headers().set(HttpHeaderNames.CONTENT_SECURITY_POLICY, "default-src 'none'; img-src data:");
        answer.headers().set("X-Content-Type-Options", "nosniff");
        answer.headers().set(HttpHeaderNames.VARY, HttpHeaderNames.ACCEPT);
        return answer;
    }

    /** Read when it is first asked for. */
    private static final class Description {
        static final String TEXT = read();

        private static String read() {
            try (InputStream file = Pages.class.getResourceAsStream(DESCRIPTION)) {
                return new String(file.readAllBytes(), StandardCharsets.UTF_8);
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }
}
