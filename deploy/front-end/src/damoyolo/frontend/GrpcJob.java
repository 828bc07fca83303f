package damoyolo.frontend;

import com.google.gson.JsonElement;
import com.google.gson.JsonParser;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import org.pytorch.serve.grpc.inference.PredictionResponse;
import org.pytorch.serve.job.GRPCJob;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;

/**
 * In place of TorchServe's GRPCJob for predictions: passes the metadata of the call to the handler as request
 * headers, and an answer of the handler with an error status to the client as an error. Answered once, by a worker
 * or by PendingJob.
 */
public final class GrpcJob extends GRPCJob {
    private static final String OPTION_PREFIX = "x-detect-";

    private final ServerCallStreamObserver<PredictionResponse> client;
    private final PendingJob pending;

    public GrpcJob(StreamObserver<PredictionResponse> client, String modelName, String modelVersion,
            WorkerCommands command, RequestInput input) {
        super(client, modelName, modelVersion, command, input);
        this.client = (ServerCallStreamObserver<PredictionResponse>) client;
        GrpcCall call = GrpcCall.KEY.get();
        Metadata metadata = call.metadata();
        for (String name : metadata.keys()) {
            if (name.startsWith(OPTION_PREFIX) && !name.endsWith(Metadata.BINARY_HEADER_SUFFIX)) {
                input.updateHeaders(name, metadata.get(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER)));
            }
        }
        pending = PendingJob.of(this);
        pending.register();
        call.waitFor(pending);
    }

    @Override
    public void response(byte[] body, CharSequence contentType, int code, String reason, Map<String, String> headers) {
        if (!pending.claim()) {
            return;
        }
        pending.answered(code);
        if (code < 400) {
            super.response(body, contentType, code, reason, headers);
        } else {
            fail(code, messageOf(body, reason));
        }
    }

    @Override
    public void setScheduled() {
        super.setScheduled();
        pending.taken();
    }

    @Override
    public void sendError(int code, String message) {
        if (pending.claim()) {
            pending.measure(code);
            fail(code, message);
        }
    }

    private void fail(int code, String message) {
        if (!client.isCancelled()) {
            client.onError(statusOf(code).withDescription(message).asRuntimeException());
        }
    }

    private static Status statusOf(int code) {
        switch (code) {
            case 401:
            case 403:
                return Status.PERMISSION_DENIED;
            case 404:
                return Status.NOT_FOUND;
            case 408:
            case 504:
                return Status.DEADLINE_EXCEEDED;
            case 429:
            case 503:
            case 507:
                return Status.RESOURCE_EXHAUSTED;
            default:
                return code < 500 ? Status.INVALID_ARGUMENT : Status.INTERNAL;
        }
    }

    /** The message of an error body, {"code", "type", "message"}. */
    private static String messageOf(byte[] body, String reason) {
        try {
            JsonElement error = JsonParser.parseString(new String(body, StandardCharsets.UTF_8));
            return error.getAsJsonObject().get("message").getAsString();
        } catch (RuntimeException noErrorBody) { // no JSON, no object, or a message that is no text
            return reason;
        }
    }
}
