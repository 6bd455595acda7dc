//
//  lambda.cpp - as much of AWS Lambda as its Web Adapter needs
//
//    lambda PORT TARGET_PORT ADAPTER TARGET
//
//  Turns every HTTP request on PORT into an invocation (an event of API
//  Gateway, payload format 2.0) and the adapter's streamed result back into an
//  HTTP response. ADAPTER is started as an extension, and TARGET as the runtime
//  once the adapter has registered, which is Lambda's own order. Both belong to
//  this process group.
//
//  A thread serves each connection. The adapter takes invocations one by one,
//  or AWS_LAMBDA_MAX_CONCURRENCY at once. Not simulated: limits of size and
//  time, and what Lambda does when a process exits.
//

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <strings.h>
#include <thread>

extern char **environ;

namespace {

using Lock = std::unique_lock<std::mutex>;

constexpr auto kEvent =
    R"({"version":"2.0","routeKey":"$default","rawPath":"%PATH%",)"
    R"("rawQueryString":"%QUERY%","headers":{%HEADERS%},"requestContext":{)"
    R"("accountId":"1","apiId":"bench","domainName":"localhost",)"
    R"("domainPrefix":"bench","requestId":"1","routeKey":"$default",)"
    R"("stage":"$default","time":"01/Jan/2026:00:00:00 +0000",)"
    R"("timeEpoch":1767225600000,"http":{"method":"%METHOD%",)"
    R"("path":"%PATH%","protocol":"HTTP/1.1","sourceIp":"127.0.0.1",)"
    R"("userAgent":"bench"}},"body":"%BODY%","isBase64Encoded":true})";

struct Invocation {
  std::string event;
  int client = -1;
  bool done = false;
  std::condition_variable ended;
};

std::mutex mutex;
std::condition_variable available;
std::deque<std::string> waiting; // ids
std::map<std::string, std::shared_ptr<Invocation>> invocations;

char *target = nullptr;
std::string api_address;

class Connection {
public:
  explicit Connection(int fd) : fd_(fd) {}
  Connection(const Connection &) = delete;
  ~Connection() { close(fd_); }

  int fd() const { return fd_; }

  // The request line and the header lines, each with its CRLF. Empty: closed.
  std::string read_head() {
    for (;;) {
      const auto end = in_.find("\r\n\r\n");
      if (end != std::string::npos) { return take(end + 4); }
      if (!fill()) { return {}; }
    }
  }

  // At least one byte, at most so many. Empty: closed.
  std::string read_some(size_t limit) {
    if (in_.empty() && !fill()) { return {}; }
    return take(std::min(limit, in_.size()));
  }

  std::string read_exactly(size_t count) {
    while (in_.size() < count && fill()) {}
    return take(std::min(count, in_.size()));
  }

  std::string read_line() {
    for (;;) {
      const auto end = in_.find("\r\n");
      if (end != std::string::npos) { return take(end + 2); }
      if (!fill()) { return {}; }
    }
  }

private:
  bool fill() {
    char buffer[65536];
    const auto n = recv(fd_, buffer, sizeof buffer, 0);
    // The adapter sends a result in several pieces and leaves Nagle's algorithm
    // on: a delayed acknowledgement would add 40 ms.
    const int on = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
    if (n > 0) { in_.append(buffer, static_cast<size_t>(n)); }
    return n > 0;
  }

  std::string take(size_t count) {
    auto taken = in_.substr(0, count);
    in_.erase(0, count);
    return taken;
  }

  int fd_;
  std::string in_;
};

void send_all(int fd, const std::string &data) {
  for (size_t sent = 0; sent < data.size();) {
    const auto n =
        send(fd, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) { return; } // the reader of this connection notices, too
    sent += static_cast<size_t>(n);
  }
}

std::string header(const std::string &head, const std::string &name) {
  const auto *at = strcasestr(head.c_str(), ("\r\n" + name + ": ").c_str());
  if (!at) { return {}; }
  at += name.size() + 4;
  return std::string(at, std::strstr(at, "\r\n"));
}

void replace_all(std::string &text, const std::string &from,
                 const std::string &to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos;) {
    text.replace(at, from.size(), to);
    at += to.size();
  }
}

std::string json(std::string text) {
  replace_all(text, "\\", "\\\\");
  replace_all(text, "\"", "\\\"");
  return text;
}

std::string base64(const std::string &data) {
  constexpr auto letters =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < data.size(); i += 3) {
    auto bits = 0U;
    for (size_t k = 0; k < 3; k++) {
      const auto byte = i + k < data.size() ? data[i + k] : '\0';
      bits = bits << 8 | static_cast<unsigned char>(byte);
    }
    for (size_t k = 0; k < 4; k++) {
      out += i + k <= data.size() ? letters[bits >> (18 - 6 * k) & 63] : '=';
    }
  }
  return out;
}

std::string event_of(const std::string &head, const std::string &body) {
  const auto method_end = head.find(' ');
  const auto target_end = head.find(' ', method_end + 1);
  const auto path = head.substr(method_end + 1, target_end - method_end - 1);
  const auto query = std::min(path.find('?'), path.size());
  std::string headers;
  for (auto at = head.find("\r\n") + 2; at + 2 < head.size();) {
    const auto end = head.find("\r\n", at);
    const auto colon = head.find(": ", at);
    headers += (headers.empty() ? "\"" : ",\"") +
               json(head.substr(at, colon - at)) + "\":\"" +
               json(head.substr(colon + 2, end - colon - 2)) + "\"";
    at = end + 2;
  }
  std::string event = kEvent;
  replace_all(event, "%METHOD%", head.substr(0, method_end));
  replace_all(event, "%PATH%", json(path.substr(0, query)));
  replace_all(event, "%QUERY%",
              json(path.substr(std::min(query + 1, path.size()))));
  replace_all(event, "%HEADERS%", headers);
  replace_all(event, "%BODY%", base64(body));
  return event;
}

// One client: every request becomes an invocation, one after the other.
void serve_client(int fd) {
  Connection connection(fd);
  for (;;) {
    const auto head = connection.read_head();
    if (head.empty()) { return; }
    const auto length = header(head, "Content-Length");
    const auto body = connection.read_exactly(
        length.empty() ? 0 : static_cast<size_t>(std::atoll(length.c_str())));
    auto invocation = std::make_shared<Invocation>();
    invocation->event = event_of(head, body);
    invocation->client = fd;
    static auto last_id = 0; // guarded by the mutex
    Lock lock(mutex);
    const auto id = std::to_string(++last_id);
    invocations[id] = invocation;
    waiting.push_back(id);
    available.notify_one();
    invocation->ended.wait(lock, [&] { return invocation->done; });
  }
}

void end_invocation(const std::string &id) {
  const Lock lock(mutex);
  const auto found = invocations.find(id);
  if (found == invocations.end()) { return; }
  found->second->done = true;
  found->second->ended.notify_one();
  invocations.erase(found);
}

int client_of(const std::string &id) {
  const Lock lock(mutex);
  const auto found = invocations.find(id);
  return found == invocations.end() ? -1 : found->second->client;
}

void start(char *command) {
  char *argv[] = {command, nullptr};
  pid_t pid = 0;
  if (posix_spawn(&pid, command, nullptr, nullptr, argv, environ) != 0) {
    std::perror(command);
    std::exit(1);
  }
}

void respond(int fd, const std::string &status, const std::string &headers,
             const std::string &body = "") {
  send_all(fd, "HTTP/1.1 " + status + "\r\n" + headers + "Content-Length: " +
                   std::to_string(body.size()) + "\r\n\r\n" + body);
}

// The value behind `name` in the metadata that precedes a streamed result.
std::string value_of(const std::string &metadata, const std::string &name) {
  const auto at = metadata.find('"' + name + "\":");
  if (at == std::string::npos) { return {}; }
  const auto from = metadata.find_first_not_of('"', at + name.size() + 3);
  return metadata.substr(from, metadata.find_first_of("\",}", from) - from);
}

// A streamed result: metadata, eight NULs, then the body; all of it chunked.
class Result {
public:
  explicit Result(int client) : client_(client) {}

  void add(const std::string &data) {
    if (in_body_) {
      send_body(data);
      return;
    }
    metadata_ += data;
    const auto end = metadata_.find(std::string(8, '\0'));
    if (end == std::string::npos) { return; }
    in_body_ = true;
    send_head();
    send_body(metadata_.substr(end + 8));
  }

  void finish() {
    if (!in_body_) {
      respond(client_, "502 Bad Gateway", "");
    } else if (chunked_) {
      send_all(client_, "0\r\n\r\n");
    }
  }

private:
  void send_head() {
    const auto length = value_of(metadata_, "content-length");
    chunked_ = length.empty();
    send_all(client_,
             "HTTP/1.1 " + value_of(metadata_, "statusCode") +
                 " \r\nContent-Type: " + value_of(metadata_, "content-type") +
                 (chunked_ ? "\r\nTransfer-Encoding: chunked"
                           : "\r\nContent-Length: " + length) +
                 "\r\n\r\n");
  }

  void send_body(const std::string &data) {
    if (data.empty()) { return; }
    if (!chunked_) {
      send_all(client_, data);
      return;
    }
    char size[24];
    std::snprintf(size, sizeof size, "%zx\r\n", data.size());
    send_all(client_, size + data + "\r\n");
  }

  int client_;
  std::string metadata_;
  bool in_body_ = false;
  bool chunked_ = false;
};

void read_result(Connection &connection, Result &result) {
  for (;;) {
    auto rest = std::strtoull(connection.read_line().c_str(), nullptr, 16);
    if (rest == 0) { break; }
    while (rest > 0) {
      const auto data = connection.read_some(rest);
      if (data.empty()) { return; }
      result.add(data);
      rest -= data.size();
    }
    connection.read_line();
  }
  while (connection.read_line().size() > 2) {} // trailers
  result.finish();
}

void send_next_invocation(int fd) {
  Lock lock(mutex);
  available.wait(lock, [] { return !waiting.empty(); });
  const auto id = waiting.front();
  waiting.pop_front();
  const auto event = invocations[id]->event;
  lock.unlock();
  respond(fd, "200 OK",
          "Content-Type: application/json\r\n"
          "Lambda-Runtime-Aws-Request-Id: " +
              id +
              "\r\nLambda-Runtime-Deadline-Ms: 4102444800000\r\n"
              "Lambda-Runtime-Invoked-Function-Arn: "
              "arn:aws:lambda:us-east-1:1:function:bench\r\n",
          event);
}

void serve_result(Connection &connection, const std::string &head,
                  const std::string &path) {
  const auto id_start = path.find("invocation/") + 11;
  const auto id = path.substr(id_start, path.find('/', id_start) - id_start);
  Result result(client_of(id));
  if (header(head, "Transfer-Encoding") == "chunked") {
    read_result(connection, result);
  } else { // an error
    connection.read_exactly(static_cast<size_t>(
        std::atoll(header(head, "Content-Length").c_str())));
    result.finish();
  }
  end_invocation(id);
  respond(connection.fd(), "202 Accepted", "");
}

// One connection of the adapter.
void serve_adapter(int fd) {
  Connection connection(fd);
  for (;;) {
    const auto head = connection.read_head();
    if (head.empty()) { return; }
    const auto from = head.find(' ') + 1;
    const auto path = head.substr(from, head.find(' ', from) - from);
    if (path == "/2020-01-01/extension/register") {
      connection.read_exactly(static_cast<size_t>(
          std::atoll(header(head, "Content-Length").c_str())));
      respond(fd, "200 OK", "Lambda-Extension-Identifier: 1\r\n", "{}");
      start(target);
    } else if (path == "/2018-06-01/runtime/invocation/next") {
      send_next_invocation(fd);
    } else if (path.find("/runtime/invocation/") != std::string::npos) {
      serve_result(connection, head, path);
    } // extension/event/next: it subscribed to no event, so none comes
  }
}

int listen_on(int port) {
  const auto fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto *generic = reinterpret_cast<sockaddr *>(&address);
  if (bind(fd, generic, size) != 0 || listen(fd, 4096) != 0 ||
      getsockname(fd, generic, &size) != 0) {
    std::perror("lambda: listen");
    std::exit(1);
  }
  api_address = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  return fd;
}

[[noreturn]] void accept_all(int listener, void (*serve)(int)) {
  for (;;) {
    const auto fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) { continue; }
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    std::thread(serve, fd).detach();
  }
}

} // namespace

int main(int argc, char **argv) {
  if (argc != 5) {
    std::fputs("usage: lambda PORT TARGET_PORT ADAPTER TARGET\n", stderr);
    return 2;
  }
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  std::signal(SIGCHLD, SIG_IGN); // no zombies
  target = argv[4];
  const auto clients = listen_on(std::atoi(argv[1]));
  const auto api = listen_on(0);
  setenv("PORT", argv[2], 1);
  setenv("AWS_LAMBDA_RUNTIME_API", api_address.c_str(), 1);
  setenv("AWS_LAMBDA_FUNCTION_NAME", "bench", 1);
  setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1024", 1);
  setenv("AWS_LAMBDA_FUNCTION_VERSION", "1", 1);
  std::thread(accept_all, api, serve_adapter).detach();
  start(argv[3]);
  accept_all(clients, serve_client);
}
