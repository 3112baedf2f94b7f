// Closed-loop load on a server of the contract: a client that costs less than what it measures.
//
//   load ADDRESS stream|unary CONNECTIONS
//
// The sessions come on the standard input, one a line: an id, at t = 0, and its row of x, which is
// sent again and again. An empty line ends them. Each is stepped once, which connects everything;
// then "ready" is printed. The next line of the input is the window: when to begin, from when on
// replies count, and when to end, in seconds of CLOCK_MONOTONIC (Python's time.monotonic). From
// begin to end each session has one message on its way, and sends the next when its reply is there.
//
// Printed then: for each session its id, its t and the first output of its last reply; an empty
// line; for each reply that counts when its message was sent, and its latency, both in seconds.
//
// The environment says how it gets in: LOAD_CA_FILE, LOAD_CERT_FILE and LOAD_KEY_FILE, in PEM, for
// TLS; LOAD_CREDENTIAL is sent as a bearer token. Empty, or not there: without.
//
// Every reply is checked. The first one that is wrong ends the program with status 1.

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <latch>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "stepstate/v1/stepstate.grpc.pb.h"

namespace {

using stepstate::v1::StepRequest;
using stepstate::v1::StepResponse;
using stepstate::v1::StepstateService;

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC
using Seconds = std::chrono::duration<double>;

// The calls of other sessions are on gRPC's threads: the program ends at once, without destructors.
[[noreturn]] void Fail(const std::string& why) {
  std::cerr << why << std::endl;
  std::_Exit(1);
}

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The content of the file that a variable names; nothing if it names none.
std::string Content(const char* variable) {
  const std::string path = Variable(variable);
  if (path.empty()) return "";
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  if (!file) Fail(path + " can't be read");
  return content.str();
}

void AddCredential(grpc::ClientContext& context) {
  static const std::string credential = Variable("LOAD_CREDENTIAL");
  if (!credential.empty()) context.AddMetadata("authorization", "Bearer " + credential);
}

// What all sessions share.
struct Run {
  explicit Run(std::size_t sessions) : first_replies(sessions), finished(sessions) {}

  std::latch first_replies;
  std::latch finished;
  // Set while no message is on its way.
  Clock::time_point start;
  Clock::time_point finish;
};

// One session: its requests, one after the other, and the check of their replies.
class Session {
 public:
  Session(Run& run, const std::string& id, const std::vector<float>& x) : run_(run) {
    request_.set_session_id(id);
    request_.mutable_x()->Assign(x.begin(), x.end());
    request_.set_t(0);
  }
  virtual ~Session() = default;

  // Sends the request; `Replied` follows, on a thread of gRPC.
  virtual void Send() = 0;

  void Print() const {
    std::printf("%s %llu %.9g\n", request_.session_id().c_str(),
                static_cast<unsigned long long>(request_.t()), response_.y(0));
  }
  void PrintLatencies() const {
    for (const auto& [sent, latency] : replies_) std::printf("%.6f %.9f\n", sent, latency);
  }

 protected:
  // Sends no more; `Finished` follows.
  virtual void End() = 0;

  void Sending() { sent_ = Clock::now(); }

  void Replied() {
    const Clock::time_point now = Clock::now();
    Check();
    request_.set_t(response_.t());
    if (!begun_) {
      begun_ = true;
      run_.first_replies.count_down();
      return;
    }
    if (run_.start <= now && now < run_.finish) {
      replies_.push_back({Seconds(sent_.time_since_epoch()).count(), Seconds(now - sent_).count()});
    }
    if (now < run_.finish) {
      Send();
    } else {
      End();
    }
  }

  void Finished() { run_.finished.count_down(); }

  StepRequest request_;
  StepResponse response_;

 private:
  struct Reply {
    double sent;
    double latency;
  };

  void Check() const {
    if (response_.has_error()) Fail("a step was refused: " + response_.error().message());
    const bool is_next = response_.session_id() == request_.session_id() &&
                         response_.t() == request_.t() + 1 && response_.y_size() > 0;
    if (!is_next) {
      Fail("a step at t = " + std::to_string(request_.t()) + " was answered with " +
           response_.ShortDebugString());
    }
  }

  Run& run_;
  bool begun_ = false;
  Clock::time_point sent_;
  std::vector<Reply> replies_;
};

// A session with a StreamSteps call of its own.
class StreamSession final : public Session,
                            public grpc::ClientBidiReactor<StepRequest, StepResponse> {
 public:
  StreamSession(Run& run, StepstateService::Stub& stub, const std::string& id,
                const std::vector<float>& x)
      : Session(run, id, x) {
    AddCredential(context_);
    stub.async()->StreamSteps(&context_, this);
    AddHold();  // the first message of the window is sent from the main thread
    StartCall();
  }

  void Send() override {
    Sending();
    StartRead(&response_);
    StartWrite(&request_);
  }

  // The next message needs both: the write may be told after the reply to it, on another thread.
  void OnWriteDone(bool ok) override { Done(ok); }
  void OnReadDone(bool ok) override { Done(ok); }

  void OnDone(const grpc::Status& status) override {
    if (!status.ok()) Fail("a stream ended: " + status.error_message());
    if (!ending_) Fail("the server ended a stream");
    Finished();
  }

 private:
  void Done(bool ok) {
    if (!ok) {
      if (!failed_.exchange(true)) RemoveHold();  // OnDone says why
      return;
    }
    if (--unfinished_ == 0) {
      unfinished_ = 2;
      Replied();
    }
  }

  void End() override {
    ending_ = true;
    StartWritesDone();
    RemoveHold();
  }

  grpc::ClientContext context_;
  std::atomic<int> unfinished_ = 2;
  std::atomic<bool> failed_ = false;
  std::atomic<bool> ending_ = false;
};

// A session that is stepped by one call after the other.
class UnarySession final : public Session {
 public:
  UnarySession(Run& run, StepstateService::Stub& stub, const std::string& id,
               const std::vector<float>& x)
      : Session(run, id, x), stub_(stub) {}

  void Send() override {
    context_ = std::make_unique<grpc::ClientContext>();
    AddCredential(*context_);
    Sending();
    stub_.async()->Step(context_.get(), &request_, &response_, [this](grpc::Status status) {
      if (!status.ok()) Fail("a call failed: " + status.error_message());
      Replied();
    });
  }

 private:
  void End() override { Finished(); }

  StepstateService::Stub& stub_;
  std::unique_ptr<grpc::ClientContext> context_;
};

struct Row {
  std::string id;
  std::vector<float> x;
};

std::vector<Row> ReadRows() {
  std::vector<Row> rows;
  for (std::string line; std::getline(std::cin, line) && !line.empty();) {
    std::istringstream words(line);
    Row row;
    words >> row.id;
    for (float value; words >> value;) row.x.push_back(value);
    rows.push_back(std::move(row));
  }
  if (rows.empty()) Fail("no session was named");
  return rows;
}

std::shared_ptr<grpc::ChannelCredentials> Credentials() {
  const std::string authority = Content("LOAD_CA_FILE");
  if (authority.empty()) return grpc::InsecureChannelCredentials();
  return grpc::SslCredentials({authority, Content("LOAD_KEY_FILE"), Content("LOAD_CERT_FILE")});
}

std::vector<std::unique_ptr<StepstateService::Stub>> Connect(const std::string& address,
                                                             int connections) {
  std::vector<std::unique_ptr<StepstateService::Stub>> stubs;
  for (int number = 0; number < connections; ++number) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // else channels share a connection
    stubs.push_back(StepstateService::NewStub(
        grpc::CreateCustomChannel(address, Credentials(), arguments)));
  }
  return stubs;
}

Clock::time_point ReadMoment() {
  double seconds = 0.0;
  if (!(std::cin >> seconds)) std::_Exit(0);  // whoever wanted the load is gone
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(Seconds(seconds)));
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> given(arguments + 1, arguments + count);
  if (given.size() != 3 || (given[1] != "stream" && given[1] != "unary") ||
      std::atoi(given[2].c_str()) < 1) {
    Fail("usage: load ADDRESS stream|unary CONNECTIONS");
  }
  const std::vector<Row> rows = ReadRows();
  const auto stubs = Connect(given[0], std::atoi(given[2].c_str()));

  Run run(rows.size());
  std::vector<std::unique_ptr<Session>> sessions;
  for (const Row& row : rows) {
    StepstateService::Stub& stub = *stubs[sessions.size() % stubs.size()];
    if (given[1] == "stream") {
      sessions.push_back(std::make_unique<StreamSession>(run, stub, row.id, row.x));
    } else {
      sessions.push_back(std::make_unique<UnarySession>(run, stub, row.id, row.x));
    }
  }
  for (const auto& session : sessions) session->Send();
  run.first_replies.wait();
  std::cout << "ready" << std::endl;

  const Clock::time_point begin = ReadMoment();
  run.start = ReadMoment();
  run.finish = ReadMoment();
  std::this_thread::sleep_until(begin);
  for (const auto& session : sessions) session->Send();
  run.finished.wait();

  for (const auto& session : sessions) session->Print();
  std::printf("\n");
  for (const auto& session : sessions) session->PrintLatencies();
  std::fflush(stdout);
  std::_Exit(0);  // gRPC's threads need not be waited for
}
