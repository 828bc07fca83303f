package damoyolo.frontend;

import io.netty.channel.ChannelHandlerContext;
import java.util.Map;
import org.pytorch.serve.job.RestJob;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;

/** In place of TorchServe's RestJob for requests: answered once, by a worker or by PendingJob. */
public final class HttpJob extends RestJob {
    private final PendingJob pending;
    private boolean streaming;

    public HttpJob(ChannelHandlerContext client, String modelName, String modelVersion, WorkerCommands command,
            RequestInput input) {
        super(client, modelName, modelVersion, command, input);
        pending = PendingJob.of(this);
        pending.register();
        if (client != null) { // null within a workflow
            ((RequestHandler) client.handler()).waitFor(pending);
        }
    }

    @Override
    public void response(byte[] body, CharSequence contentType, int code, String reason, Map<String, String> headers) {
        if (streaming || pending.claim()) {
            pending.answered(code);
            // The rest of a streamed answer follows; the time limit is for its first part.
            streaming = headers != null && "true".equals(headers.get(RequestInput.TS_STREAM_NEXT));
            super.response(body, contentType, code, reason, headers);
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
            pending.measure(code == 413 ? 507 : code); // as RestJob answers
            super.sendError(code, message);
        }
    }
}
