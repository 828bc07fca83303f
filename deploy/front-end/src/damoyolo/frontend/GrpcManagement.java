package damoyolo.frontend;

import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import org.pytorch.serve.grpc.management.ManagementResponse;
import org.pytorch.serve.grpc.management.RegisterModelRequest;
import org.pytorch.serve.grpcimpl.ManagementImpl;
import org.pytorch.serve.http.BadRequestException;

/** In place of TorchServe's gRPC service for management: registration is checked as over HTTP. */
public final class GrpcManagement extends ManagementImpl {
    @Override
    public void registerModel(RegisterModelRequest request, StreamObserver<ManagementResponse> answers) {
        try {
            Registration.check(new org.pytorch.serve.http.messages.RegisterModelRequest(request));
        } catch (BadRequestException error) {
            answers.onError(Status.INVALID_ARGUMENT.withDescription(error.getMessage()).asRuntimeException());
            return;
        }
        super.registerModel(request, answers);
    }
}
