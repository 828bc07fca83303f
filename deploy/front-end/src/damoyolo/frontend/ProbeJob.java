package damoyolo.frontend;

import java.util.Base64;
import java.util.Map;
import java.util.UUID;
import java.util.function.IntConsumer;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.InputParameter;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.pytorch.serve.wlm.Model;

/** An inference of a built-in image, whose status goes to a listener instead of a client. */
final class ProbeJob extends Job {
    /** A grey JPEG of 64x64. */
    private static final byte[] IMAGE = Base64.getDecoder().decode(
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5"
            + "PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/wAAR"
            + "CABAAEADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAT/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFAEBAAAAAAAAAAAAAAAAAAAA"
            + "AP/EABQRAQAAAAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/AIQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAf/2Q==");

    private final IntConsumer listener;

    ProbeJob(Model model, IntConsumer listener) {
        super(model.getModelName(), model.getVersion(), WorkerCommands.PREDICT, input());
        this.listener = listener;
    }

    private static RequestInput input() {
        RequestInput input = new RequestInput(UUID.randomUUID().toString());
        input.updateHeaders("content-type", "image/jpeg");
        input.addParameter(new InputParameter("body", IMAGE, "image/jpeg"));
        return input;
    }

    @Override
    public void response(byte[] body, CharSequence contentType, int code, String reason, Map<String, String> headers) {
        listener.accept(code);
    }

    @Override
    public void sendError(int code, String message) {
        listener.accept(code);
    }

    @Override
    public boolean isOpen() {
        return true;
    }
}
