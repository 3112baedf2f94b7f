// The floor: the contract's steps, answered at once by a C++ gRPC server with the callback API.
//
// It listens on a free port of 127.0.0.1, and prints which. It keeps nothing, and computes nothing:
// what it costs is what the C++ library costs, with the same messages parsed and made.

#include <grpcpp/grpcpp.h>

#include <iostream>
#include <memory>

#include "stepstate/v1/stepstate.grpc.pb.h"

namespace {

using stepstate::v1::StepRequest;
using stepstate::v1::StepResponse;
using stepstate::v1::StepstateService;

void Answer(const StepRequest& request, StepResponse* response) {
  response->Clear();
  response->set_session_id(request.session_id());
  response->set_t(request.t() + 1);
  response->set_durable_t(request.t());
  if (request.x_size() > 0) response->add_y(request.x(0));
}

// One StreamSteps call; it deletes itself when it has ended.
class Stream final : public grpc::ServerBidiReactor<StepRequest, StepResponse> {
 public:
  Stream() { StartRead(&request_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::OK);
      return;
    }
    Answer(request_, &response_);
    StartWrite(&response_);
  }

  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);
    } else {
      Finish(grpc::Status::CANCELLED);
    }
  }

  void OnDone() override { delete this; }

 private:
  StepRequest request_;
  StepResponse response_;
};

class Echo final : public StepstateService::CallbackService {
  grpc::ServerBidiReactor<StepRequest, StepResponse>* StreamSteps(
      grpc::CallbackServerContext*) override {
    return new Stream;
  }

  grpc::ServerUnaryReactor* Step(grpc::CallbackServerContext* context, const StepRequest* request,
                                 StepResponse* response) override {
    Answer(*request, response);
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
};

}  // namespace

int main() {
  Echo service;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two servers never share a port
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    std::cerr << "no port is free" << std::endl;
    return 1;
  }
  std::cout << "echo on 127.0.0.1:" << port << std::endl;
  server->Wait();
}
