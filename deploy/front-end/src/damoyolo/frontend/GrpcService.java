package damoyolo.frontend;

import io.grpc.BindableService;
import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.ForwardingServerCall.SimpleForwardingServerCall;
import io.grpc.ForwardingServerCallListener.SimpleForwardingServerCallListener;
import io.grpc.Metadata;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.ServerInterceptors;
import io.grpc.ServerServiceDefinition;
import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.grpc.inference.PredictionResponse;
import org.pytorch.serve.grpc.inference.PredictionsRequest;
import org.pytorch.serve.grpcimpl.InferenceImpl;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.http.InternalServerException;

/** In place of TorchServe's InferenceImpl as the gRPC service for inference, which it extends. */
public final class GrpcService implements BindableService {
    @Override
    public ServerServiceDefinition bindService() {
        return ServerInterceptors.intercept(new Inference(), new CallInterceptor());
    }

    private static final class Inference extends InferenceImpl {
        /**
         * Answers with a stream of one message. TorchServe's own method answers, too, but its job then waits
         * for a mark that only a streaming handler sets: a NullPointerException, which ends the worker.
         */
        @Override
        public void streamPredictions(PredictionsRequest request, StreamObserver<PredictionResponse> answers) {
            predictions(request, answers);
        }

        /** For models with sequence batching, which this one is not. */
        @Override
        public StreamObserver<PredictionsRequest> streamPredictions2(StreamObserver<PredictionResponse> answers) {
            answers.onError(Status.UNIMPLEMENTED
                    .withDescription("StreamPredictions2 is for models with sequence batching; use Predictions")
                    .asRuntimeException());
            return new Ignore();
        }
    }

    private static final class Ignore implements StreamObserver<PredictionsRequest> {
        @Override
        public void onNext(PredictionsRequest request) {}

        @Override
        public void onError(Throwable error) {}

        @Override
        public void onCompleted() {}
    }

    /** Refuses calls while the server drains, and gives errors of TorchServe itself, all INTERNAL, their own status. */
    private static final class CallInterceptor implements ServerInterceptor {
        @Override
        public <Q, A> ServerCall.Listener<Q> interceptCall(
                ServerCall<Q, A> call, Metadata metadata, ServerCallHandler<Q, A> next) {
            GrpcCall state = new GrpcCall(metadata); // counted before the look, so that the drain sees what was let in
            if (Drain.isRefusing()) {
                Drain.refused();
                state.end();
                call.close(Status.UNAVAILABLE.withDescription("The server is about to end."), new Metadata());
                return new ServerCall.Listener<Q>() {};
            }
            ServerCall<Q, A> checked = new SimpleForwardingServerCall<Q, A>(call) {
                @Override
                public void close(Status status, Metadata trailers) {
                    super.close(statusOf(status, state), trailers);
                    state.end();
                }
            };
            ServerCall.Listener<Q> listener =
                    Contexts.interceptCall(Context.current().withValue(GrpcCall.KEY, state), checked, metadata, next);
            return new SimpleForwardingServerCallListener<Q>(listener) {
                @Override
                public void onCancel() {
                    state.cancel();
                    super.onCancel();
                }
            };
        }

        private static Status statusOf(Status status, GrpcCall state) {
            Throwable cause = status.getCause();
            if (cause instanceof ModelNotFoundException || cause instanceof ModelVersionNotFoundException) {
                return Status.NOT_FOUND.withDescription(cause.getMessage());
            }
            if (cause instanceof BadRequestException) {
                return Status.INVALID_ARGUMENT.withDescription(cause.getMessage());
            }
            // The only use of this exception in the service: the queue is full, or no worker is left.
            return cause instanceof InternalServerException
                    ? Status.RESOURCE_EXHAUSTED.withDescription(state.whyNotQueued(cause.getMessage()))
                    : status;
        }
    }
}
