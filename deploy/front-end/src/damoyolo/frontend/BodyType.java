package damoyolo.frontend;

import io.netty.buffer.ByteBuf;
import io.netty.buffer.Unpooled;
import io.netty.handler.codec.http.DefaultHttpRequest;
import io.netty.handler.codec.http.DefaultLastHttpContent;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.multipart.DefaultHttpDataFactory;
import io.netty.handler.codec.http.multipart.HttpPostRequestDecoder;
import io.netty.util.ByteProcessor;
import java.nio.charset.StandardCharsets;
import java.util.Locale;
import java.util.regex.Pattern;
import org.pytorch.serve.http.BadRequestException;

/**
 * Finds out what a body is that is declared as a form, and bounds the work of decoding forms.
 *
 * <p>`curl --data-binary @picture.jpg`, `curl -d @request.json` and Python's urllib declare every body as
 * application/x-www-form-urlencoded. TorchServe would decode a picture as a form and answer 500 with bytes of
 * the picture in answer and log. Each field costs TorchServe and the worker about 4 microseconds and some
 * objects, so a body of 34 MB with 17 million fields would take the heap.
 */
final class BodyType {
    static final int MAX_FIELDS = 100;
    static final int MAX_NAME_BYTES = 256;
    static final int MAX_PART_HEADER_BYTES = 8192; // as for the headers of the request
    /** RFC 2046, 5.1.1. */
    private static final Pattern BOUNDARY = Pattern.compile("[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]");

    private BodyType() {}

    /** Corrects the content type of a body that is no form; refuses forms with too many or too long fields. */
    static void settle(FullHttpRequest request) {
        CharSequence mimeType = HttpUtil.getMimeType(request);
        if (HttpHeaderValues.APPLICATION_X_WWW_FORM_URLENCODED.contentEqualsIgnoreCase(mimeType)) {
            CharSequence actual = typeOfDeclaredForm(request.content());
            request.headers().set(HttpHeaderNames.CONTENT_TYPE, actual);
            if (actual == HttpHeaderValues.APPLICATION_X_WWW_FORM_URLENCODED) {
                requireDecodable(request, request.content().duplicate());
            }
        } else if (String.valueOf(mimeType).toLowerCase(Locale.ROOT).startsWith("multipart/form-data")) { // as Netty
            settleMultipart(request);
        }
    }

    /**
     * Decodes a body as TorchServe will do. Where that fails in TorchServe, buffers are not released, as
     * Netty's leak detector reports (-Dio.netty.leakDetection.level=paranoid).
     */
    private static void requireDecodable(FullHttpRequest request, ByteBuf body) {
        // Without its body, so that there is a decoder to destroy when the body fails.
        HttpRequest head = new DefaultHttpRequest(
                request.protocolVersion(), request.method(), request.uri(), request.headers());
        HttpPostRequestDecoder decoder = new HttpPostRequestDecoder(new DefaultHttpDataFactory(Long.MAX_VALUE), head);
        try {
            decoder.offer(new DefaultLastHttpContent(body));
        } catch (RuntimeException error) { // also NullPointerException and the like, for a part without a name
            throw new BadRequestException(
                    "The body cannot be decoded as the form or multipart that its content type says; send the image as "
                            + "the raw body, or as the field data, body or image of a complete multipart/form-data body.");
        } finally {
            decoder.destroy();
        }
    }

    private static void settleMultipart(FullHttpRequest request) {
        String body = request.content().toString(StandardCharsets.ISO_8859_1); // a character for each byte
        String boundary = boundaryOf(request.headers().get(HttpHeaderNames.CONTENT_TYPE));
        if (boundary == null && !body.startsWith("--")) { // a picture with a wrong type
            request.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_OCTET_STREAM);
            return;
        }
        if (boundary == null || !BOUNDARY.matcher(boundary).matches()) {
            throw new BadRequestException("The content type multipart/form-data has no valid boundary; let the HTTP library set both.");
        }
        String empty = withoutContents(body, "--" + boundary);
        // Nothing but the boundary, so that Netty looks for the parts that were checked.
        request.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.MULTIPART_FORM_DATA + "; boundary=" + boundary);
        requireDecodable(request, Unpooled.copiedBuffer(empty, StandardCharsets.ISO_8859_1));
    }

    /** The content type of the body, as its first bytes and the names of its fields show. */
    private static CharSequence typeOfDeclaredForm(ByteBuf body) {
        int first = body.forEachByte(value -> value == ' ' || value == '\t' || value == '\r' || value == '\n');
        if (first < 0) {
            return HttpHeaderValues.APPLICATION_X_WWW_FORM_URLENCODED; // the handler says that there is no image
        }
        byte opening = body.getByte(first);
        if (opening == '{' || opening == '[') {
            return HttpHeaderValues.APPLICATION_JSON;
        }
        FormScan scan = new FormScan();
        boolean complete = body.forEachByte(scan) < 0;
        return complete && scan.hasValue
                ? HttpHeaderValues.APPLICATION_X_WWW_FORM_URLENCODED
                : HttpHeaderValues.APPLICATION_OCTET_STREAM;
    }

    /** Reads a form to its end; stops at a byte that none has (any picture has one among its first bytes). */
    private static final class FormScan implements ByteProcessor {
        boolean hasValue;
        private int fields = 1;
        private int nameBytes;
        private boolean inName = true;

        @Override
        public boolean process(byte value) {
            if (value == '&') {
                inName = true;
                nameBytes = 0;
                if (++fields > MAX_FIELDS) {
                    throw new BadRequestException(
                            "The form has more than " + MAX_FIELDS + " fields; send the image as the raw body, or as one of at most "
                                    + MAX_FIELDS + " fields.");
                }
            } else if (value == '=') {
                inName = false;
                hasValue = true;
            } else if (inName && ++nameBytes > MAX_NAME_BYTES) {
                return false;
            }
            // UTF-8 (negative bytes) that is not percent-encoded is accepted, as TorchServe does.
            return value < 0 || value >= ' ' || value == '\t' || value == '\r' || value == '\n';
        }
    }

    /**
     * The body with empty parts: enough to see whether their headers can be decoded. Limits the number of parts
     * and the length of their headers, both of which Netty would decode without an end. Finds parts where Netty
     * does, which accepts line feeds as line ends.
     */
    private static String withoutContents(String body, String delimiter) {
        StringBuilder empty = new StringBuilder();
        int parts = 0;
        int at = indexOfLine(body, delimiter, skipBlanks(body, 0));
        while (at >= 0) {
            at += delimiter.length();
            if (at == body.length() || body.startsWith("--", at)) {
                break; // the end, after which nothing is decoded
            }
            if (!isEmptyLine(body, at)) {
                throw new BadRequestException("A line of the multipart body begins with the delimiter but is longer; use another boundary.");
            }
            if (++parts > MAX_FIELDS) {
                throw new BadRequestException("The multipart body has more than " + MAX_FIELDS + " parts.");
            }
            int headerEnd = endOfHeaders(body, body.indexOf('\n', at) + 1);
            empty.append(delimiter).append(body, at, headerEnd).append("\r\n");
            at = indexOfLine(body, delimiter, headerEnd);
        }
        return empty.append(delimiter).append("--\r\n").toString();
    }

    /** The next place at `from` or after a line feed where the body goes on with `text`; -1 if there is none. */
    private static int indexOfLine(String body, String text, int from) {
        int at = body.indexOf(text, from);
        while (at > from && body.charAt(at - 1) != '\n') {
            at = body.indexOf(text, at + 1);
        }
        return at;
    }

    /** The index after the empty line that ends the headers, or the end of the body; reads lines as Netty does. */
    private static int endOfHeaders(String body, int start) {
        int at = start;
        while (at < body.length() && !isEmptyLine(body, at)) {
            int lineStart = skipBlanks(body, at);
            int lineFeed = body.indexOf('\n', lineStart);
            at = lineFeed < 0 ? body.length() : lineFeed + 1;
            if (at - start > MAX_PART_HEADER_BYTES) {
                throw new BadRequestException("A part of the multipart body has more than " + MAX_PART_HEADER_BYTES + " bytes of headers.");
            }
            if (isMultipart(body.substring(lineStart, at))) {
                throw new BadRequestException("A part of the multipart body is itself multipart; send each image as a part of its own.");
            }
        }
        return at < body.length() ? body.indexOf('\n', at) + 1 : at;
    }

    private static boolean isEmptyLine(String body, int at) {
        return body.startsWith("\r\n", at) || body.startsWith("\n", at);
    }

    /** Netty skips these before a delimiter and before a header. */
    private static int skipBlanks(String body, int from) {
        int at = from;
        while (at < body.length() && (Character.isISOControl(body.charAt(at)) || Character.isWhitespace(body.charAt(at)))) {
            at++;
        }
        return at;
    }

    private static boolean isMultipart(String line) {
        // Netty decodes headers as UTF-8, and accepts spaces and control characters around name and value.
        String header = new String(line.getBytes(StandardCharsets.ISO_8859_1), StandardCharsets.UTF_8);
        String[] pair = header.toLowerCase(Locale.ROOT).split(":", 2);
        return pair.length == 2
                && pair[0].strip().startsWith("content-type")
                && pair[1].strip().trim().startsWith("multipart/");
    }

    /** The parameter of the content type, perhaps empty; null if there is none. */
    private static String boundaryOf(String contentType) {
        for (String parameter : contentType.split(";")) {
            String[] pair = parameter.split("=", 2);
            if (pair.length == 2 && pair[0].trim().equalsIgnoreCase("boundary")) {
                String value = pair[1].trim();
                boolean quoted = value.length() >= 2 && value.startsWith("\"") && value.endsWith("\"");
                return quoted ? value.substring(1, value.length() - 1) : value;
            }
        }
        return null;
    }
}
