// warmproxy.hpp: a lazy-starting reverse proxy.
//
// The first request starts an existing HTTP server program (the target).
// warmproxy waits until the target is ready and then proxies everything to it,
// byte for byte. It is built for places where a server is only wanted while
// somebody uses it: serverless functions, containers that scale to zero, small
// servers.
//
// How a request travels (each section below uses only what stands above it):
//
//   client -- Server -- Connection -- Exchange -- target
//                                        |
//                                    Supervisor
//
//   Server      accepts connections and gives each one to an event loop.
//   Connection  reads one request head, strictly. Then it responds itself,
//               lends the client's connection to an own route, or runs an
//               Exchange.
//   Exchange    sends the request to the target and pumps bytes in both
//               directions until the framing says that the message is complete.
//               After a 101 it is a tunnel, which ends when both sides have
//               closed, or with the target. Uploads, streams, early responses
//               and WebSockets all use this one pump. Each direction has one
//               buffer.
//   Supervisor  owns the target's whole life on a thread of its own: cold,
//               starting, up, stopping. Requests wait for it to report "up" and
//               never touch the process.
//
// RFC 9110 defines the semantics of HTTP, RFC 9112 its messages on the wire.
//
// Out of scope: TLS and HTTP/2 (the platform's edge or a front proxy does
// them), caching, compression, load balancing, CONNECT, Windows.
//
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 warmproxy contributors

#ifndef WARMPROXY_HPP
#define WARMPROXY_HPP

#define WARMPROXY_VERSION "0.2.0"
#define WARMPROXY_VERSION_MAJOR 0
#define WARMPROXY_VERSION_MINOR 2
#define WARMPROXY_VERSION_PATCH 0

// ---- Requirements ----------------------------------------------------------

#if defined(_WIN32) || defined(__APPLE__)
#error "warmproxy.hpp needs Linux or another system with POSIX.1-2024."
#endif
#if __cplusplus < 201703L
#error "warmproxy.hpp needs C++17 or later: compile with -std=c++17."
#endif
#if !defined(__cpp_exceptions)
#error                                                                         \
    "warmproxy.hpp reports errors by exceptions: compile without -fno-exceptions."
#endif

#include "httplib.h"

#ifndef CPPHTTPLIB_VERSION
#error "warmproxy.hpp needs cpp-httplib (0.11.4 or later) as httplib.h."
#endif

#include <arpa/inet.h>
#include <fcntl.h>
#include <locale.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

// ---- Limits ----------------------------------------------------------------

// Bytes of a request or response head. RFC 9112, section 3 asks for at least
// 8,000 bytes of request line. By default, Node accepts 16 KB and nginx four
// times 8 KB.
#ifndef WARMPROXY_MAX_HEAD_SIZE
#define WARMPROXY_MAX_HEAD_SIZE 65536
#endif
// Header lines of a head. Each costs 48 bytes of bookkeeping, so 64 KB of "a:"
// would take 800 KB. Node takes 2000, Apache and HAProxy 100.
#ifndef WARMPROXY_MAX_HEADER_LINES
#define WARMPROXY_MAX_HEADER_LINES 1000
#endif
// Options that Connection may list: every header line is compared with each.
#ifndef WARMPROXY_MAX_CONNECTION_OPTIONS
#define WARMPROXY_MAX_CONNECTION_OPTIONS 100
#endif
// Bytes read from a socket at once: the memory that a busy stream holds.
#ifndef WARMPROXY_READ_SIZE
#define WARMPROXY_READ_SIZE 32768
#endif
// Milliseconds from the first byte of a request head to its last: bounds how
// long slow heads can hold a connection.
#ifndef WARMPROXY_HEAD_TIMEOUT
#define WARMPROXY_HEAD_TIMEOUT 30000
#endif
// Milliseconds in which a client has to read a response of our own in full.
// With an own route: milliseconds without progress, in either direction.
#ifndef WARMPROXY_SEND_TIMEOUT
#define WARMPROXY_SEND_TIMEOUT 75000
#endif
// Milliseconds after which an idle upstream connection is closed. Node and
// uvicorn close theirs after 5 s, most servers after 60 s.
#ifndef WARMPROXY_UPSTREAM_IDLE_TIMEOUT
#define WARMPROXY_UPSTREAM_IDLE_TIMEOUT 20000
#endif
// Milliseconds without a response on a new upstream connection after which the
// idle ones are closed: a single-connection server may be blocked on them.
#ifndef WARMPROXY_STALL_TIMEOUT
#define WARMPROXY_STALL_TIMEOUT 250
#endif
// Milliseconds of grace after a client half-closes: most such clients are gone,
// but one that merely finished sending still gets a prompt response.
#ifndef WARMPROXY_HALF_CLOSE_GRACE
#define WARMPROXY_HALF_CLOSE_GRACE 100
#endif
// Milliseconds after which a second readiness probe is sent while the target
// has accepted the first one but not answered it.
#ifndef WARMPROXY_PROBE_PATIENCE
#define WARMPROXY_PROBE_PATIENCE 15000
#endif
// Steps of one connection before the others have their turn. A step reads and
// writes at most once in each direction.
#ifndef WARMPROXY_STEPS_PER_TURN
#define WARMPROXY_STEPS_PER_TURN 8
#endif
// Idle upstream connections that an event loop may keep beyond one per client
// connection: for reuse when each client sends one request and disconnects.
#ifndef WARMPROXY_SPARE_UPSTREAMS
#define WARMPROXY_SPARE_UPSTREAMS 4
#endif
// Event loops: one per CPU, but not more than this. Four saturate most targets.
#ifndef WARMPROXY_MAX_LOOPS
#define WARMPROXY_MAX_LOOPS 4
#endif
// How many times one request may be sent to the target.
#ifndef WARMPROXY_MAX_ATTEMPTS
#define WARMPROXY_MAX_ATTEMPTS 3
#endif

namespace warmproxy {
inline namespace v0_2_0 {

// ---- The public API --------------------------------------------------------

// Options::target_port: whichever port the program opens.
inline constexpr int any_port = -1;

// What to run, when it counts as ready, where to listen, and what to answer.
// Only `binary` is required. options_from_env() reads `host` and `port` from
// HOST and PORT, and each other field but `env`, `log` and `error` from
// WARMPROXY_<FIELD>. A timeout of milliseconds::max() never passes.
struct Options {
  // The program to run. With a '/', it is looked for relative to the current
  // directory, then relative to the directory of this executable; without one,
  // on PATH. Required.
  std::string binary;
  // The program's arguments. "{port}" in an argument is replaced with the
  // target's port, and must not be used with `any_port`.
  std::vector<std::string> args;
  // The port on which the program listens, on 127.0.0.1 or ::1. The default, 0,
  // picks a free port for every start. The port is always exported as $PORT. If
  // a fixed port already accepts connections, the server there is used and
  // nothing is started. `any_port` uses the one port that the program's process
  // group opens (Linux only); with several open ports none is used, since one
  // of them may be a debugger.
  int target_port = 0;
  // Variables added to the program's environment; they override inherited ones.
  // "{port}" is replaced as in `args`. Never inherited: WARMPROXY_* and
  // VERCEL_IPC_PATH, which are meant for the proxy; HOST and HOSTNAME, which
  // make some servers listen on other addresses than loopback; and LISTEN_FDS
  // and NODE_CHANNEL_FD with their companions, since the descriptors that they
  // name are closed.
  std::map<std::string, std::string> env;
  // The program's working directory; it must exist. Default: the current one.
  std::string directory;
  // Run the program in a writable copy of `directory`, made inside this folder,
  // for platforms whose file system is read-only. A file that has changed (in
  // path, size, mode or change time) leads to a new copy; what the program
  // wrote stays in the old one. A start fails if the folder cannot be written,
  // belongs to a user other than us or root, or lets every user write to it (it
  // may with the sticky bit, as /tmp has it). Default: no copy.
  std::string scratch;
  // A path prefix to remove from request targets, on a segment boundary. The
  // target learns it as X-Forwarded-Prefix, and the paths in Location,
  // Content-Location and WebDAV's Destination are mapped. Default: none.
  std::string strip_prefix;
  // Start the program when we begin to listen instead of with the first
  // request. Default: false; serve() sets it on Vercel unless
  // WARMPROXY_PREWARM says otherwise.
  bool prewarm = false;

  // Readiness probe: the path to GET until the target answers with a status
  // other than 502, 503 and 504. Many servers listen before they can serve.
  // Empty: a successful TCP connect is enough. With the default, a target that
  // still answers 502 to 504 at the end of `startup_timeout` is used as it is.
  std::string health_path = "/";
  // How long a start may take. After that it is given up, and the requests that
  // wait for it get 504. Default: 45 s, below the 60 s at which many edges give
  // up on us. Above 0.
  std::chrono::milliseconds startup_timeout{45000};
  // The budget for stopping. Running requests have half of it to finish; then
  // the target gets SIGTERM, and at the end SIGKILL goes to its process group.
  // Default: 8 s, below the 10 s of `docker stop`. 0 kills at once.
  std::chrono::milliseconds stop_timeout{8000};
  // Stop the target after this much time without a request, stream or tunnel.
  // 0, the default: never.
  std::chrono::milliseconds idle_stop{0};
  // On Vercel: how long a request that may have changed something (any method
  // but GET, HEAD, OPTIONS and TRACE) counts as running after its response, so
  // that the instance is not frozen while the target still sends mail. The
  // client does not wait. 0, the default: not at all.
  std::chrono::milliseconds background_work{0};

  // The address and port on which serve() listens; "" and "*" stand for all
  // IPv4 addresses. Port 0 picks a free port, which is logged. Default:
  // 0.0.0.0:3000.
  std::string host = "0.0.0.0";
  int port = 3000;
  // The most simultaneous client connections, at least 1. When that number is
  // reached, the connection that has been idle for longest makes room; where
  // none is idle, new ones are answered with 503. Lowered to what the limit on
  // open files allows, two for each connection. Default: 1024.
  std::size_t max_connections = 1024;
  // Idle timeout of client connections. A load balancer in front must have a
  // shorter one, or it sends requests into connections that are just closing.
  // Default: 75 s, as nginx has it. 0: never, as always on Vercel.
  std::chrono::milliseconds keep_alive_timeout{75000};
  // Trust the forwarding headers (X-Forwarded-*, Forwarded, X-Real-IP) of every
  // client. Set it only if all clients come through a proxy that sets them.
  // Default: false, they are replaced with the address and host of the client's
  // own connection.
  bool trust_proxy = false;

  // Origins whose pages may use the target, as "https://example.org"; "*"
  // stands for any. Preflight requests are then answered here, and the origin
  // is echoed with credentials allowed: "*" lets every page act with a
  // visitor's cookies. Default: empty, CORS is left to the target.
  std::vector<std::string> cors_origins;
  // How long a CDN may keep scripts and style sheets. Replaces the target's
  // Cache-Control; browsers then choose how long to keep them. 0, the default:
  // whatever the target says.
  std::chrono::seconds cdn_cache{0};
  // Browser navigations that wait longer than this for a start get a
  // self-refreshing "starting up" page. Default: 5 s. 0: never.
  std::chrono::milliseconds waiting_page_after{5000};
  // The path of our own status: JSON, or Prometheus metrics where Accept or
  // "?format=prometheus" asks for them. Anyone who can connect can read it.
  // Default: empty, none.
  std::string status_path;
  // Receives each log line, without a line end, from any thread. It should not
  // block; what it throws is ignored. Default: stderr, prefixed "[warmproxy] ".
  std::function<void(std::string_view)> log;

  // Filled by options_from_env(): the variable that could not be read, and its
  // value. serve() prints it and returns 2; Proxy throws it.
  std::string error;
};

// A snapshot of a Proxy.
struct Status {
  std::string state = "cold"; // "cold", "starting", "up" or "stopping"
  long pid = 0;               // of the target; 0: none, or not started by us
  int port = 0;               // of the target; 0: not known yet
  // Starts so far, including servers that were found running and, with
  // any_port, programs that have changed their port.
  std::uint64_t starts = 0;
  std::string last_exit; // how the target ended last; empty: it never did
  std::chrono::milliseconds up_for{0};     // time since it became ready, if up
  std::chrono::milliseconds last_start{0}; // how long the last good start took
  std::uint64_t requests = 0;              // requests sent to the target so far
  std::size_t in_flight = 0;   // requests, streams and tunnels it serves now
  std::size_t connections = 0; // open client connections
};

// A listening socket and the target behind it, for use within a program.
//
//   warmproxy::Options options;
//   options.binary = "./server";
//   warmproxy::Proxy proxy(options);
//   proxy.routes("/own").Get("/own/time", handler);
//   proxy.listen("0.0.0.0", 8080);
//
// From its construction on, a Proxy has a thread and a child process, the
// watchdog, which is a fork of your program: construct it after fork() and
// daemon(), for in a child it does not listen, and before the program holds
// much memory. The Proxy reaps both the watchdog and the target. If your own
// program reaps all its children, or ignores SIGCHLD, the target's exit status
// is lost; if it waits for all of them, it waits for the watchdog. cpp-httplib
// ignores SIGPIPE for the whole process once a Server exists, which a Proxy
// relies on.
class Proxy {
public:
  // Throws std::invalid_argument, naming the field, for options that cannot be
  // served; std::system_error if threads or descriptors run out.
  explicit Proxy(Options options);
  // Stops, waits for listen() or listen_after_bind() to return in any thread,
  // and stops the target.
  ~Proxy();
  Proxy(const Proxy &) = delete;
  Proxy &operator=(const Proxy &) = delete;

  // Binds and serves until stop(). Returns false if it cannot listen. A Proxy
  // listens once: a second call returns false.
  bool listen(const std::string &host, int port);
  // Binds to a free port and returns it, for listen_after_bind(); -1 if it
  // cannot, or once the Proxy has listened.
  int bind_to_any_port(const std::string &host);
  // Serves until stop(). Returns true when the last request has finished, or
  // has been aborted because Options::stop_timeout had passed, and the target
  // has stopped; false if nothing is bound, or once the Proxy has listened.
  bool listen_after_bind();
  // Callable from any thread; does not wait. A stopped Proxy stays stopped.
  void stop();
  // Callable from any thread.
  Status status() const;

  // Own routes: requests for `prefix` and the paths below it, on a segment
  // boundary, are answered by the returned cpp-httplib server on its thread
  // pool. They never start the target and do not count as use of it. The
  // longest prefix wins; the same prefix returns the same server. Prefixes are
  // compared with the path as sent, before Options::strip_prefix.
  //
  // The server's listen(), stop(), is_running(), WebSocket handlers, its time
  // limits for reading and writing, its keep-alive settings and its mount
  // points outside `prefix` have no effect here; register routes, error
  // handlers, its payload limit and new_task_queue as usual, before listening.
  //
  // A handler must return: stopping waits for it, without limit. To learn that
  // the client has gone it uses DataSink::is_writable(): on a descriptor above
  // 1023, Request::is_connection_closed() is wrong.
  //
  // Throws std::invalid_argument for "" and "/" (use a Server of your own
  // instead) and for a prefix with blanks, control characters or bytes that
  // have to be percent-encoded, and std::logic_error once the Proxy listens.
  httplib::Server &routes(std::string prefix);

  // Called on an event loop before a request is proxied, and before the target
  // is started. Not called for own routes, Options::status_path, and the
  // preflight requests that Options::cors_origins answers.
  // HandlerResponse::Handled sends `res`; Unhandled proxies the request. `req`
  // has method, target, path, params, headers and remote address, but no body,
  // and `res` may have a body, but no content provider or file. The handler
  // must not block: it holds up other connections. An exception is answered
  // with 500. Throws std::logic_error once the Proxy listens.
  void set_pre_routing_handler(httplib::Server::HandlerWithResponse handler);

private:
  class Impl;

  std::unique_ptr<Impl> impl_;
};

// Returns `defaults`, overridden by the environment: WARMPROXY_<FIELD>, PORT
// and HOST. Unset variables keep the defaults; an empty one is an empty text or
// list, and an error for all other fields. WARMPROXY_ARGS is split like a shell
// command line, quotes included; durations are 500ms, 45s, 10m, 2h or 30d;
// WARMPROXY_TARGET_PORT may be `auto` (any_port). If WARMPROXY_BINARY is set,
// the defaults' `args` and `target_port` belong to another program and are
// reset. What cannot be read is reported in Options::error. A WARMPROXY_
// variable that is not a setting is logged as a warning. Those that Kubernetes
// sets for a Service whose name begins with "warmproxy" are ignored.
Options options_from_env(Options defaults);

// For main(): listens on Options::host and Options::port until SIGTERM, SIGINT,
// SIGHUP or SIGQUIT, drains, stops the target and returns 0. Returns 1 if it
// cannot listen or is out of a resource at the start, and 2 for bad settings or
// a program that cannot be run. A second signal ends it at once, unless it
// comes within 0.1 s of the first. As PID 1 it also reaps orphans. On Vercel
// (VERCEL_IPC_PATH is set) it keeps to the runtime's contract.
//
// With main()'s arguments it answers --help and --version, and takes a command
// like tini and env do: `warmproxy [--] ./server --port {port}` sets `binary`
// and `args`, and `target_port` to 0 unless WARMPROXY_TARGET_PORT is set.
int serve(Options options, int argc = 0, const char *const *argv = nullptr);

// ============================================================================
// Nothing below is part of the API.
// ============================================================================

namespace detail {

using std::chrono::milliseconds;
using std::chrono::seconds;

// ---- Text ------------------------------------------------------------------

// RFC 9110, section 5.1: names are case-insensitive, in ASCII whatever the
// locale.
inline char to_lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
}

inline bool starts_with_ignore_case(std::string_view text,
                                    std::string_view prefix) {
  return text.size() >= prefix.size() &&
         std::equal(prefix.begin(), prefix.end(), text.begin(),
                    [](char x, char y) {
                      return x == y || to_lower(x) == to_lower(y);
                    });
}

// Small enough to be inlined: mostly, the sizes differ already.
inline bool equals_ignore_case(std::string_view a, std::string_view b) {
  return a.size() == b.size() && starts_with_ignore_case(a, b);
}

inline bool starts_with(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

inline bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() &&
         text.substr(text.size() - suffix.size()) == suffix;
}

// `part`: text or a character.
template <typename T> bool contains(std::string_view text, const T &part) {
  return text.find(part) != std::string_view::npos;
}

inline bool is_blank(char c) { return c == ' ' || c == '\t'; }

inline std::string_view trim(std::string_view text) {
  while (!text.empty() && is_blank(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && is_blank(text.back())) {
    text.remove_suffix(1);
  }
  return text;
}

// The part before the first `end`, or all of it.
inline std::string_view until(std::string_view text, char end) {
  return text.substr(0, text.find(end));
}

// The part behind the first `end`, or nothing.
inline std::string_view behind(std::string_view text, char end) {
  return text.substr(std::min(until(text, end).size() + 1, text.size()));
}

// A view of a literal, whose size the compiler knows, or of other text. Any
// array of characters is taken for a literal, so do not pass a buffer.
template <std::size_t N>
constexpr std::string_view view_of(const char (&literal)[N]) {
  return {literal, N - 1};
}
constexpr std::string_view view_of(std::string_view text) { return text; }

template <typename... Parts>
void append(std::string &out, const Parts &...parts) {
  (out.append(view_of(parts)), ...);
}

template <typename... Parts> std::string concat(const Parts &...parts) {
  std::string out;
  append(out, parts...);
  return out;
}

// Calls `function` with each element of a comma-separated list.
template <typename F> void for_each_element(std::string_view list, F function) {
  while (!list.empty()) {
    const auto element = until(list, ',');
    if (const auto trimmed = trim(element); !trimmed.empty()) {
      function(trimmed);
    }
    list.remove_prefix(std::min(element.size() + 1, list.size()));
  }
}

// Whether a comma-separated list contains this element, ignoring case.
inline bool list_contains(std::string_view list, std::string_view wanted) {
  bool found = false;
  for_each_element(list, [&](std::string_view element) {
    found |= equals_ignore_case(element, wanted);
  });
  return found;
}

// Reads a decimal number without a sign. Returns false, and leaves `number`
// alone, if `text` is not one or does not fit.
template <typename N> bool to_number(std::string_view text, N &number) {
  const auto end = text.data() + text.size();
  N n = 0;
  const auto [stop, error] = std::from_chars(text.data(), end, n);
  if (error != std::errc() || stop != end || text[0] == '-') { return false; }
  number = n;
  return true;
}

// The control characters that a header line must not contain: all but the tab.
inline bool is_control(char c) {
  return (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f;
}

inline bool has_control(std::string_view text) {
  const auto contains_one = [](std::string_view bytes) {
    return std::any_of(bytes.begin(), bytes.end(),
                       [](char c) { return is_control(c); });
  };
  // Eight bytes at a time, since this reads all of every request head.
  for (; text.size() >= 8; text.remove_prefix(8)) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, text.data(), 8);
    // Sets the high bit of each byte below 0x20 or equal to 0x7f, sometimes of
    // the byte after it, too.
    constexpr std::uint64_t ones = 0x0101010101010101;
    const auto deletes = bytes ^ (ones * 0x7f);
    const auto suspects =
        ((bytes - ones * 0x20) & ~bytes) | ((deletes - ones) & ~deletes);
    if ((suspects & (ones * 0x80)) && contains_one(text.substr(0, 8))) {
      return true;
    }
  }
  return contains_one(text);
}

// Whether `text` has neither blanks nor control characters.
inline bool is_clean(std::string_view text) {
  return !contains(text, ' ') && !contains(text, '\t') && !has_control(text);
}

// The same for paths in settings: browsers percent-encode other bytes in the
// paths that they send.
inline bool is_plain_ascii(std::string_view text) {
  return is_clean(text) && std::all_of(text.begin(), text.end(), [](char c) {
           return static_cast<unsigned char>(c) < 0x80;
         });
}

inline bool is_tchar(char c) { // RFC 9110, section 5.6.2
  static constexpr auto tchars = [] {
    std::array<bool, 256> table{};
    for (const char tchar : std::string_view(
             "!#$%&'*+-.^_`|~0123456789"
             "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")) {
      table[static_cast<unsigned char>(tchar)] = true;
    }
    return table;
  }();
  return tchars[static_cast<unsigned char>(c)];
}

inline bool is_token(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), is_tchar);
}

inline void replace_all(std::string &text, std::string_view from,
                        std::string_view to) {
  for (auto at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

template <typename N> std::string decimal(N number) {
  return std::to_string(number);
}

// With one decimal place, such as "0.9". Not by printf(3), whose decimal point
// may be the locale's comma.
template <typename Duration> std::string in_milliseconds(Duration duration) {
  using Tenths = std::chrono::duration<std::int64_t, std::ratio<1, 10000>>;
  const auto tenths = std::chrono::duration_cast<Tenths>(duration).count();
  return concat(decimal(tenths / 10), ".", decimal(tenths % 10));
}

// "45" or "0.25"
template <typename Duration> std::string in_seconds(Duration duration) {
  const auto time = std::chrono::duration_cast<milliseconds>(duration).count();
  auto fraction = decimal(1000 + time % 1000);
  fraction[0] = '.';
  fraction.erase(fraction.find_last_not_of(".0") + 1);
  return decimal(time / 1000) + fraction;
}

// Quotes a JSON string. Bytes outside ASCII are taken for Latin-1, since header
// values and paths need not be UTF-8.
inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c >= ' ' && c < 0x7f && c != '"' && c != '\\') {
      out += c;
      continue;
    }
    char escaped[8];
    std::snprintf(escaped, sizeof(escaped), "\\u%04x",
                  unsigned{static_cast<unsigned char>(c)});
    out += escaped;
  }
  return out += '"';
}

// Makes text of unknown origin fit for one log line.
inline std::string printable(std::string text) {
  std::replace_if(text.begin(), text.end(), is_control, '?');
  return text;
}

inline std::string error_text(int error) { return std::strerror(error); }

// ---- Shared by all sections ------------------------------------------------

// Options with what is derived from them. Every section reads the settings from
// here.
struct Config : Options {
  bool on_vercel = false;
  std::string prefix; // strip_prefix as "/a/b" or ""

  // Whether clients connect through a proxy whose forwarding headers are
  // trusted. They then name the client, and one connection may serve many
  // clients.
  bool behind_trusted_proxy() const { return trust_proxy || on_vercel; }
};

// Where the target listens, on the loopback interface.
struct Endpoint {
  bool ipv6 = false;
  int port = 0; // 0: not known, or there is no target

  std::string text() const {
    return concat(ipv6 ? "[::1]:" : "127.0.0.1:", decimal(port));
  }
};

// Returns "/a/b", or "" for no prefix, whatever slashes surround it.
inline std::string normalized_prefix(std::string_view prefix) {
  const auto first = prefix.find_first_not_of('/');
  if (first == std::string_view::npos) { return {}; }
  prefix = prefix.substr(0, prefix.find_last_not_of('/') + 1);
  return concat("/", prefix.substr(first));
}

// Whether the path of a request target is `prefix` or lies below it.
inline bool is_below(std::string_view request_target, std::string_view prefix) {
  if (!starts_with(request_target, prefix)) { return false; }
  const auto rest = request_target.substr(prefix.size());
  return rest.empty() || rest[0] == '/' || rest[0] == '?';
}

// ---- HTTP/1: framing, heads ------------------------------------------------

// Whether `text` equals one of `texts`, ignoring case.
template <typename Texts>
bool is_in(std::string_view text, const Texts &texts) {
  for (const std::string_view one : texts) {
    if (equals_ignore_case(one, text)) { return true; }
  }
  return false;
}

// The same for a few names.
template <typename... Names>
bool is_one_of(std::string_view text, const Names &...names) {
  return (equals_ignore_case(text, view_of(names)) || ...);
}

// Finds the end of a message's body in bytes that arrive in pieces of any size.
class Framing {
public:
  enum class Mode { none, length, chunked, until_close, tunnel };

  Framing() = default;
  explicit Framing(Mode mode, std::uint64_t length = 0)
      : left_(length), mode_(mode),
        state_(mode <= Mode::length && length == 0 ? State::end
                                                   : State::size_first) {}
  // A target's chunked body: blanks around a chunk's size and before the colon
  // of a trailer are accepted, but must not be sent on.
  static Framing forgiving_chunked() {
    Framing framing(Mode::chunked);
    framing.forgiving_ = true;
    return framing;
  }

  // Returns how many of `bytes` belong to the body. Stops after its end, before
  // a byte that makes it malformed(), or before a blank that must not be sent
  // on: see at_superfluous_blank(). Appends the content, without the chunks'
  // framing, to `content` if that is given; superfluous blanks are then taken
  // like the rest.
  std::size_t take(std::string_view bytes, std::string *content = nullptr) {
    std::size_t taken = 0;
    at_superfluous_blank_ = false;
    while (taken < bytes.size() && !done()) {
      if (mode_ != Mode::chunked || state_ == State::data) {
        taken += take_content(bytes.substr(taken), content);
        continue;
      }
      state_ = step(bytes[taken]);
      if (malformed() || (at_superfluous_blank_ && !content)) { break; }
      ++taken;
    }
    return taken;
  }

  Mode mode() const { return mode_; }
  bool done() const { return state_ == State::end; }
  bool malformed() const { return state_ == State::malformed; }
  // The next byte is a blank that must not be sent on: the caller erases it and
  // calls take() again.
  bool at_superfluous_blank() const { return at_superfluous_blank_; }
  // Whether there was such a blank.
  bool corrected() const { return corrected_; }
  void close() { state_ = State::end; }

private:
  // The position in the grammar of RFC 9112, section 7.1. In the other modes:
  // any up to the body's end, then `end`.
  enum class State : unsigned char {
    size_first, // before the first digit of a chunk size
    size,       // in a chunk size
    size_end,   // after a blank that follows the size
    extension,  // in a chunk extension
    data,       // in chunk data
    data_end,   // after the data: a CR must follow
    line_first, // at the start of a trailer line or the empty line
    name,       // in a trailer name
    name_end,   // after a blank that follows the name
    value,      // in a trailer value
    lf,         // after a CR: an LF must follow, then `next_`
    end,
    malformed
  };

  std::size_t take_content(std::string_view bytes, std::string *content) {
    // until_close and tunnel: every byte belongs to the body.
    if (mode_ > Mode::chunked) { left_ = bytes.size(); }
    const auto n =
        static_cast<std::size_t>(std::min<std::uint64_t>(left_, bytes.size()));
    if (content) { content->append(bytes.substr(0, n)); }
    left_ -= n;
    overhead_ = 0;
    if (left_ == 0) {
      state_ = mode_ == Mode::length ? State::end : State::data_end;
    }
    return n;
  }

  // Strict, except where `forgiving_` allows blanks, and control characters in
  // a trailer's value: accepting a bare LF or white space here makes request
  // smuggling possible.
  State step(char c) {
    if (++overhead_ > WARMPROXY_MAX_HEAD_SIZE) { return State::malformed; }
    const bool blank = forgiving_ && is_blank(c);
    switch (state_) {
    case State::size_first:
      return blank ? note_blank(State::size_first) : step_size(c);
    case State::size:
    case State::size_end:
      return blank ? note_blank(State::size_end) : step_size(c);
    case State::extension:
      if (c == '\r') { return end_size_line(); }
      return is_control(c) ? State::malformed : State::extension;
    case State::data_end:
      return c == '\r' ? before_lf(State::size_first) : State::malformed;
    case State::line_first:
      if (c == '\r') { return before_lf(State::end); }
      return is_tchar(c) ? State::name : State::malformed;
    case State::name:
      if (is_tchar(c)) { return State::name; }
      [[fallthrough]];
    case State::name_end:
      if (blank) { return note_blank(State::name_end); }
      return c == ':' ? State::value : State::malformed;
    case State::value:
      if (c == '\r') { return before_lf(State::line_first); }
      return is_value(c) ? State::value : State::malformed;
    case State::lf: return c == '\n' ? next_ : State::malformed;
    case State::data:
    case State::end:
    case State::malformed: break;
    }
    return State::malformed;
  }

  State step_size(char c) {
    const auto digit = std::string_view("0123456789abcdef").find(to_lower(c));
    if (digit != std::string_view::npos && state_ != State::size_end) {
      if (left_ >> 59) { return State::malformed; } // would be 2^63 or more
      left_ = left_ * 16 + digit;
      return State::size;
    }
    if (state_ == State::size_first) { return State::malformed; }
    if (c == ';') { return State::extension; }
    return c == '\r' ? end_size_line() : State::malformed;
  }

  State end_size_line() {
    return before_lf(left_ ? State::data : State::line_first);
  }

  State before_lf(State next) {
    next_ = next;
    return State::lf;
  }

  State note_blank(State next) {
    at_superfluous_blank_ = corrected_ = true;
    return next;
  }

  // RFC 9110, section 5.5: other control characters are bad style in what a
  // target sends, but mean nothing.
  bool is_value(char c) const {
    return forgiving_ ? c != '\0' && c != '\n' : !is_control(c);
  }

  std::uint64_t left_ = 0;   // bytes of the body, or of this chunk
  std::size_t overhead_ = 0; // bytes since a chunk's data
  Mode mode_ = Mode::none;
  State state_ = State::end, next_ = State::end;
  bool forgiving_ = false;
  bool at_superfluous_blank_ = false;
  bool corrected_ = false;
};

// A header line: its parts, and the whole as it is sent on.
struct Field {
  std::string_view name, value, line;

  bool is(std::string_view other) const {
    return equals_ignore_case(name, other);
  }
};

// A message's head. Its views point into `text`.
struct Head {
  Head() = default;
  Head(const Head &) = delete;
  Head &operator=(const Head &) = delete;

  std::string text;
  int minor = 1;             // of HTTP/1.x
  std::vector<Field> fields; // in their order
  // A Bloom filter of the fields' names (see name_bit()): most searches for a
  // name are in vain, and end here.
  std::uint64_t name_bits = 0;
  std::vector<std::string_view> connection_options;
  std::uint64_t content_length = 0;
  Framing framing;         // of the body that follows
  bool keep_alive = false; // as the version and Connection say

  void clear_fields() {
    fields.clear();
    name_bits = 0;
    connection_options.clear();
    content_length = 0;
    framing = Framing();
    keep_alive = false;
  }

  static std::uint64_t name_bit(std::string_view name) {
    const auto first = static_cast<unsigned char>(to_lower(name[0]));
    return std::uint64_t{1} << ((name.size() + first) % 64);
  }
  bool may_contain(std::string_view name) const {
    return (name_bits & name_bit(name)) != 0;
  }

  const Field *find(std::string_view name) const {
    if (!may_contain(name)) { return nullptr; }
    for (const auto &field : fields) {
      if (field.is(name)) { return &field; }
    }
    return nullptr;
  }

  // The value of the first such field; "" if there is none.
  std::string_view value(std::string_view name) const {
    const auto field = find(name);
    return field ? field->value : std::string_view();
  }

  auto count(std::string_view name) const {
    return std::count_if(fields.begin(), fields.end(),
                         [name](const Field &field) { return field.is(name); });
  }

  // Calls `function` with each element of the lists in the fields `name`.
  template <typename F>
  void for_each_in(std::string_view name, F function) const {
    if (!may_contain(name)) { return; }
    for (const auto &field : fields) {
      if (field.is(name)) { for_each_element(field.value, function); }
    }
  }

  // Whether an element of these lists begins with one of the words: what
  // follows it, as in `private="Set-Cookie"`, does not matter.
  bool lists(std::initializer_list<std::string_view> names,
             std::initializer_list<std::string_view> words) const {
    bool found = false;
    for (const auto name : names) {
      for_each_in(name, [&](std::string_view element) {
        const auto word = element.substr(0, element.find_first_of(" \t="));
        found |= is_in(word, words);
      });
    }
    return found;
  }

  bool has_option(std::string_view option) const {
    return is_in(option, connection_options);
  }

  bool is_hop_by_hop(const Field &field) const { // RFC 9110, section 7.6.1
    return is_one_of(field.name, "Connection", "HTTP2-Settings", "Keep-Alive",
                     "Proxy-Connection", "TE", "Upgrade") ||
           has_option(field.name);
  }
};

struct RequestHead : Head {
  std::string_view method;
  std::string_view request_target; // in origin-form, or "*"
  std::string_view authority;      // of a request target in absolute-form
  std::string_view host;           // the authority, or Host's value
  std::string protocols;           // of Upgrade, but for those not passed on

  bool upgrades() const { return !protocols.empty(); }
  std::string_view path() const { return until(request_target, '?'); }
  std::string_view query() const { return behind(request_target, '?'); }
  bool is_safe() const { // RFC 9110, section 9.2.1
    return method == "GET" || method == "HEAD" || method == "OPTIONS" ||
           method == "TRACE";
  }
};

struct ResponseHead : Head {
  int status = 0;
  std::string_view status_and_reason; // "200 OK"
  // The connection must not be reused: the head was repaired, or a body may
  // follow a 304 that announced one.
  bool must_close = false;
  std::vector<std::string> repairs; // of this head, for the log

  bool is_switching() const { return status == 101; }
  // The target could not read the request. Some parsers stay lost: all that
  // follows on the connection is answered the same.
  bool is_parse_error() const {
    return status == 400 || status == 414 || status == 431 || status == 501 ||
           status == 505;
  }
  void note_repair(std::string repair) {
    must_close = true;
    repairs.push_back(printable(std::move(repair)));
  }
};

// Why a head is refused, and with which status.
struct Refusal {
  int status = 0; // 0: it is not refused
  const char *reason = "";
  explicit operator bool() const { return status != 0; }
};

// What HeadWriter needs besides the heads.
struct Forwarding {
  const Config &config;
  std::string_view client_address;
  Endpoint target;
};

// ---- Parsing: what requests and responses share

inline std::string_view first_element(std::string_view list) {
  return trim(until(list, ','));
}

// Returns the size of the head at the start of `bytes`, including its empty
// line, or 0 if it is incomplete. The first `from` bytes were searched before.
inline std::size_t head_end(std::string_view bytes, std::size_t from = 0) {
  // A bare LF ends an empty line here, too, so that the parser can refuse it.
  from = from > 2 ? from - 2 : 0;
  for (auto at = bytes.find('\n', from); at != std::string_view::npos;
       at = bytes.find('\n', at + 1)) {
    const auto rest = bytes.substr(at + 1, 2);
    if (!rest.empty() && rest[0] == '\n') { return at + 2; }
    if (rest == "\r\n") { return at + 3; }
  }
  return 0;
}

enum class LineEnd { none, lf, crlf };

// Takes one line off `text`.
inline LineEnd take_line(std::string_view &text, std::string_view &line) {
  const auto end = text.find('\n');
  if (end == std::string_view::npos) { return LineEnd::none; }
  line = text.substr(0, end);
  text.remove_prefix(end + 1);
  if (line.empty() || line.back() != '\r') { return LineEnd::lf; }
  line.remove_suffix(1);
  return LineEnd::crlf;
}

// The value of the first header line of this name in unparsed text, or nothing.
inline std::optional<std::string_view> find_line(std::string_view text,
                                                 std::string_view name) {
  for (std::string_view line; take_line(text, line) != LineEnd::none;) {
    if (equals_ignore_case(until(line, ':'), name)) {
      return trim(behind(line, ':'));
    }
  }
  return {};
}

inline Refusal parse_field(std::string_view line, bool from_client,
                           Field &field) {
  if (from_client ? has_control(line)
                  : contains(line, '\r') || contains(line, '\0')) {
    return {400, "control character in a header"};
  }
  std::size_t size = 0;
  while (size < line.size() && is_tchar(line[size])) {
    ++size;
  }
  if (size == 0 || size == line.size() || line[size] != ':') {
    return {400, "malformed header line"}; // a folded one too, and "Name :"
  }
  field = {line.substr(0, size), trim(line.substr(size + 1)), line};
  return {};
}

// Reads header lines up to the empty one. A target's may end in a bare LF and
// contain control characters (RFC 9110, section 5.5), a client's must not.
inline Refusal parse_fields(std::string_view text, bool from_client,
                            Head &head) {
  head.clear_fields();
  head.fields.reserve(16); // most heads have fewer
  std::string_view line;
  for (;;) {
    const auto end = take_line(text, line);
    if (end == LineEnd::none || (from_client && end == LineEnd::lf)) {
      return {400, "bare LF in the head"};
    }
    if (line.empty()) { break; }
    if (head.fields.size() == WARMPROXY_MAX_HEADER_LINES) {
      return {431, "too many header lines"};
    }
    Field field;
    if (const auto refusal = parse_field(line, from_client, field)) {
      return refusal;
    }
    head.fields.push_back(field);
    head.name_bits |= Head::name_bit(field.name);
  }
  head.for_each_in("Connection", [&](std::string_view option) {
    head.connection_options.push_back(option);
  });
  if (head.connection_options.size() > WARMPROXY_MAX_CONNECTION_OPTIONS) {
    return {431, "too many connection options"};
  }
  // RFC 9112, section 9.3
  head.keep_alive = !head.has_option("close") &&
                    (head.minor == 1 || head.has_option("keep-alive"));
  return {};
}

struct Uri {
  std::string_view scheme, authority, path; // `path` with query and fragment
};

// Splits "scheme://authority/path", or "/path" alone; nothing if `text` is of
// neither form.
inline std::optional<Uri> split_uri(std::string_view text) {
  if (starts_with(text, "//")) { return {}; } // "//host/path"
  if (starts_with(text, "/")) { return Uri{{}, {}, text}; }
  const auto colon = text.find("://");
  const auto scheme = text.substr(0, colon);
  if (colon == std::string_view::npos || !is_token(scheme) ||
      scheme.find_first_of("!#$%&'*^_`|~") != std::string_view::npos ||
      contains("+-.0123456789", scheme.substr(0, 1))) {
    return {};
  }
  const auto rest = text.substr(colon + 3);
  const auto authority = rest.substr(0, rest.find_first_of("/?#"));
  return Uri{scheme, authority, rest.substr(authority.size())};
}

// ---- Parsing: requests

inline bool is_malformed_authority(std::string_view authority) {
  return authority.find_first_of(" \t,/?#@\\<>\"") != std::string_view::npos;
}

// RFC 9112, section 3.2.
inline Refusal check_host(const RequestHead &head) {
  const auto hosts = head.count("Host");
  if (hosts > 1) { return {400, "several Host lines"}; }
  if (hosts == 0 && head.minor == 1) { return {400, "no Host line"}; }
  return is_malformed_authority(head.value("Host"))
             ? Refusal{400, "malformed Host"}
             : Refusal{};
}

// Turns absolute-form into origin-form (RFC 9112, sections 3.2.1 to 3.2.4).
inline Refusal parse_request_target(RequestHead &head) {
  if (starts_with(head.request_target, "/") ||
      (head.request_target == "*" && head.method == "OPTIONS")) {
    return {};
  }
  const auto uri = split_uri(head.request_target);
  if (!uri || uri->authority.empty() ||
      is_malformed_authority(uri->authority)) {
    return {400, "malformed request target"};
  }
  head.authority = uri->authority;
  head.request_target = !uri->path.empty()         ? uri->path
                        : head.method == "OPTIONS" ? "*"
                                                   : "/";
  return {};
}

inline Refusal parse_request_line(std::string_view line, RequestHead &head) {
  const auto first = line.find(' '), last = line.rfind(' ');
  if (first == last || !is_token(line.substr(0, first))) {
    return {400, "malformed request line"};
  }
  head.method = line.substr(0, first);
  head.request_target = line.substr(first + 1, last - first - 1);
  const auto version = line.substr(last + 1);
  if (!is_clean(head.request_target) || contains(head.request_target, '#')) {
    return {400, "malformed request target"};
  }
  if (version != "HTTP/1.1" && version != "HTTP/1.0") {
    const bool other = version.size() == 8 && starts_with(version, "HTTP/") &&
                       version[6] == '.';
    return other ? Refusal{505, "an HTTP version other than 1.0 and 1.1"}
                 : Refusal{400, "malformed request line"};
  }
  head.minor = version.back() - '0';
  if (head.method == "CONNECT") { return {501, "CONNECT is not supported"}; }
  return parse_request_target(head);
}

// Refuses the beginning of a head that can never become a request. The first
// `searched` bytes were passed before.
inline Refusal early_refusal(std::string_view bytes, std::size_t searched = 0) {
  if (starts_with(bytes, "\x16\x03")) {
    return {400, "a TLS handshake on a port for plain HTTP"};
  }
  // Starts with the line that was incomplete last time.
  const auto start = bytes.substr(0, searched).rfind('\n') + 1;
  bool in_first_line = start == 0;
  auto rest = bytes.substr(start);
  std::string_view line;
  for (auto end = take_line(rest, line); end != LineEnd::none;
       end = take_line(rest, line), in_first_line = false) {
    if (end == LineEnd::lf) { return {400, "bare LF in the head"}; }
    RequestHead head;
    Field field;
    if (const auto refusal = in_first_line ? parse_request_line(line, head)
                                           : parse_field(line, true, field)) {
      return refusal;
    }
  }
  if (ends_with(rest, "\r")) { rest.remove_suffix(1); }
  if (in_first_line && !rest.empty() &&
      (!is_token(until(rest, ' ')) || has_control(rest) ||
       contains(rest, '\t') || std::count(rest.begin(), rest.end(), ' ') > 2)) {
    return {400, "malformed request line"};
  }
  return {};
}

// RFC 9112, section 6.3, without anything that two parsers could read
// differently.
inline Refusal parse_request_framing(RequestHead &head) {
  const auto coding = head.find("Transfer-Encoding");
  const auto length = head.find("Content-Length");
  if (head.count("Transfer-Encoding") + head.count("Content-Length") > 1) {
    return {400, "several Transfer-Encoding or Content-Length lines"};
  }
  if (length && !to_number(length->value, head.content_length)) {
    return {400, "malformed Content-Length"};
  }
  if (length) {
    head.framing = Framing(Framing::Mode::length, head.content_length);
  }
  if (!coding) { return {}; }
  if (head.minor == 0) { return {400, "Transfer-Encoding in HTTP/1.0"}; }
  const auto codings = coding->value;
  if (!equals_ignore_case(codings, "chunked")) {
    return list_contains(codings.substr(0, codings.rfind(',')), "chunked")
               ? Refusal{400, "chunked is not the last transfer coding"}
               : Refusal{501, "a Transfer-Encoding other than chunked"};
  }
  head.framing = Framing(Framing::Mode::chunked);
  return {};
}

inline void parse_upgrade(RequestHead &head) {
  // RFC 9110, section 7.8: Upgrade is ignored in an HTTP/1.0 request.
  if (head.minor == 0 || !head.has_option("upgrade")) { return; }
  head.for_each_in("Upgrade", [&](std::string_view protocol) {
    // An upgrade to HTTP/2 or TLS would hide the requests in it from us, and
    // from whatever checks them before the target: it is not passed on, and the
    // request stays plain HTTP/1.1.
    if (equals_ignore_case(protocol, "h2c") ||
        starts_with_ignore_case(protocol, "TLS/")) {
      return;
    }
    append(head.protocols, head.upgrades() ? ", " : "", protocol);
  });
}

inline Refusal parse_request_text(RequestHead &head) {
  std::string_view rest = head.text, line;
  if (take_line(rest, line) != LineEnd::crlf) {
    return {400, "bare LF in the head"};
  }
  if (const auto refusal = parse_request_line(line, head)) { return refusal; }
  // "http://host?query": an empty path becomes "/" (RFC 9112, section 3.2.1).
  if (starts_with(head.request_target, "?")) {
    head.text.insert(head.text.find('?'), "/");
    return parse_request_text(head);
  }
  if (const auto refusal = parse_fields(rest, true, head)) { return refusal; }
  if (const auto refusal = check_host(head)) { return refusal; }
  if (const auto refusal = parse_request_framing(head)) { return refusal; }
  parse_upgrade(head);
  // RFC 9112, section 3.2.2
  head.host = head.authority.empty() ? head.value("Host") : head.authority;
  return {};
}

// After a refusal, nothing but the method may shape our response.
inline Refusal parse_request(std::string text, RequestHead &head) {
  head.text = std::move(text);
  const auto refusal = parse_request_text(head);
  if (refusal) { head.clear_fields(); }
  return refusal;
}

// ---- Parsing: responses

// Returns a target's header lines with folded ones joined (RFC 9112, section
// 5.2), without blanks before a colon (5.1), and without those whose name is
// not a token. Notes each repair in `head`.
inline std::string repaired_fields(std::string_view text, ResponseHead &head) {
  std::string out, line;
  std::string_view part;
  while (take_line(text, part) != LineEnd::none && !part.empty()) {
    line = part;
    bool folded = false;
    while (!text.empty() && is_blank(text[0]) &&
           take_line(text, part) != LineEnd::none) {
      folded = true;
      if (const auto more = trim(part); !more.empty()) {
        line.erase(line.find_last_not_of(" \t") + 1);
        append(line, " ", more);
      }
    }
    auto name = until(line, ':');
    const auto value = line.substr(name.size()); // from the colon on
    name = name.substr(0, name.find_last_not_of(" \t") + 1);
    if (value.empty() || !is_token(name)) {
      head.note_repair(concat("header line left out, since its name is no "
                              "token: ",
                              line.substr(0, 60)));
      continue;
    }
    if (folded || name.size() + value.size() < line.size()) {
      head.note_repair(concat("header line repaired: ", name.substr(0, 60)));
    }
    append(out, name, value, "\r\n");
  }
  return out += "\r\n";
}

// Reduces the fields `name` to one with `value`, or to none if that is "".
// Returns whether anything has changed. Field::line stays as it was: only for
// fields that are not sent on by their line.
inline bool keep_one(Head &head, std::string_view name,
                     std::string_view value) {
  const auto is_such = [name](const Field &field) { return field.is(name); };
  const auto first = head.find(name);
  if (!first || (!value.empty() && head.count(name) == 1 &&
                 equals_ignore_case(first->value, value))) {
    return false;
  }
  auto &fields = head.fields;
  auto from = std::find_if(fields.begin(), fields.end(), is_such);
  if (!value.empty()) { from++->value = value; }
  fields.erase(std::remove_if(from, fields.end(), is_such), fields.end());
  return true;
}

// RFC 9112, section 6.3.
inline Refusal parse_response_framing(std::string_view request_method,
                                      ResponseHead &head) {
  bool chunked = false, other_coding = false;
  head.for_each_in("Transfer-Encoding", [&](std::string_view coding) {
    chunked |= equals_ignore_case(coding, "chunked");
    other_coding |= !is_one_of(coding, "chunked", "identity");
  });
  if (other_coding) { return {502, "a Transfer-Encoding other than chunked"}; }
  if (chunked && head.minor == 0) {
    return {502, "Transfer-Encoding in HTTP/1.0"};
  }
  const bool has_length = head.find("Content-Length");
  const auto length = first_element(head.value("Content-Length"));
  if (has_length && !to_number(length, head.content_length)) {
    return {502, "malformed Content-Length"};
  }
  bool other_length = false;
  head.for_each_in("Content-Length", [&](std::string_view element) {
    std::uint64_t other = 0;
    other_length |= !to_number(element, other) || other != head.content_length;
  });
  if (other_length) { return {502, "several Content-Lengths that differ"}; }
  const bool recoded =
      keep_one(head, "Transfer-Encoding", chunked ? "chunked" : "");
  if (keep_one(head, "Content-Length", chunked ? "" : length) || recoded) {
    head.note_repair("Transfer-Encoding or Content-Length merged");
  }
  if (head.status == 304) { // a body may follow all the same
    head.must_close |= chunked || head.content_length > 0;
  } else if (request_method != "HEAD") {
    head.framing = chunked ? Framing::forgiving_chunked()
                   : has_length
                       ? Framing(Framing::Mode::length, head.content_length)
                       : Framing(Framing::Mode::until_close);
  }
  return {};
}

// A 1xx or 204 response never has a body and must not announce one.
inline void remove_framing(ResponseHead &head) {
  bool announced = keep_one(head, "Transfer-Encoding", "");
  head.for_each_in("Content-Length", [&](std::string_view length) {
    announced |= length != "0";
  });
  if (announced) {
    head.note_repair(concat("framing left out, since a ", decimal(head.status),
                            " has no body"));
  }
  keep_one(head, "Content-Length", "");
}

inline Refusal parse_response(std::string_view text,
                              std::string_view request_method,
                              ResponseHead &head) {
  head.text = text;
  head.must_close = false;
  head.repairs.clear();
  std::string_view rest = head.text, line;
  auto end = take_line(rest, line);
  if (end != LineEnd::none && line.empty()) {
    head.note_repair("empty line before the status line left out");
    end = take_line(rest, line);
  }
  if (end == LineEnd::none || line.size() < 12 ||
      (!starts_with(line, "HTTP/1.1 ") && !starts_with(line, "HTTP/1.0 ")) ||
      !to_number(line.substr(9, 3), head.status) || head.status < 100 ||
      (line.size() > 12 && line[12] != ' ') || has_control(line)) {
    return {502, "malformed status line"};
  }
  head.minor = line[7] - '0';
  auto refusal = parse_fields(rest, false, head);
  if (refusal) {
    head.text = concat(line, "\r\n", repaired_fields(rest, head));
    rest = head.text;
    take_line(rest, line);
    refusal = parse_fields(rest, false, head);
  }
  if (refusal) { return {502, refusal.reason}; }
  head.status_and_reason = line.substr(9);
  if (head.status >= 200 && head.status != 204) {
    return parse_response_framing(request_method, head);
  }
  remove_framing(head);
  return {};
}

// ---- Forwarding

// Whether a peer that is not trusted claims that the client uses TLS.
inline bool ignores_forwarded_https(const RequestHead &request,
                                    const Config &config) {
  const auto proto = first_element(request.value("X-Forwarded-Proto"));
  return !config.behind_trusted_proxy() && equals_ignore_case(proto, "https");
}

// Whether credentials of NTLM or Negotiate are exchanged: they authenticate the
// connection, not the request.
inline bool authenticates_connection(const Head &head) {
  return head.lists({"Authorization", "WWW-Authenticate"},
                    {"NTLM", "Negotiate"});
}

// Headers by which proxies name the client to each other.
inline bool is_forwarding(std::string_view name) {
  return starts_with_ignore_case(name, "X-Forwarded-") ||
         is_one_of(name, "Forwarded", "X-Forwarded", "X-Real-IP");
}

// Headers between Vercel's platform and its runtime, with credentials for both.
inline bool is_vercel_private(std::string_view name) {
  return starts_with_ignore_case(name, "X-Vercel-Internal-") ||
         starts_with_ignore_case(name, "X-Vercel-SC-");
}

inline std::string_view without_port(std::string_view authority) {
  const auto from = authority.find(']') + 1; // after an IPv6 address, or 0
  return authority.substr(0, authority.find(':', from));
}

inline void append_field(std::string &out, std::string_view name,
                         std::string_view value) {
  append(out, name, ": ", value, "\r\n");
}

// Writes whether the client's connection persists, where its HTTP version does
// not say so already (RFC 9112, section 9.3).
inline void write_persistence(const RequestHead &request, bool keep_alive,
                              std::string &out) {
  if (!keep_alive) {
    append_field(out, "Connection", "close");
  } else if (request.minor == 0) {
    append_field(out, "Connection", "keep-alive");
  }
}

// Headers that write_cors() writes in place of others'.
inline bool is_cors_permission(std::string_view name) {
  return starts_with_ignore_case(name, "Access-Control-Allow-");
}

// The CORS header lines of a response to `request`.
inline void write_cors(const RequestHead &request, const Config &config,
                       std::string &out) {
  const auto &allowed = config.cors_origins;
  if (allowed.empty()) { return; }
  // The response depends on Origin even if no CORS field follows.
  out += "Vary: Origin\r\n";
  const auto origin = request.value("Origin");
  if (origin.empty() || !(is_in("*", allowed) || is_in(origin, allowed))) {
    return;
  }
  // Fetch, section 3.2.5: with credentials, `*` is an origin like any other, so
  // the origin itself is named.
  append_field(out, "Access-Control-Allow-Origin", origin);
  append_field(out, "Access-Control-Allow-Credentials", "true");
  const auto method = request.value("Access-Control-Request-Method");
  const auto headers = request.value("Access-Control-Request-Headers");
  if (!method.empty()) {
    append_field(out, "Access-Control-Allow-Methods", method);
  }
  if (!headers.empty()) {
    append_field(out, "Access-Control-Allow-Headers", headers);
  }
}

// Writes the heads of one exchange: the request for the target or an own route,
// and the response for the client.
class HeadWriter {
public:
  HeadWriter(const RequestHead &request, const Forwarding &forwarding,
             std::string &out)
      : request_(request), forwarding_(forwarding), config_(forwarding.config),
        out_(out),
        strips_prefix_(!config_.prefix.empty() &&
                       is_below(request.request_target, config_.prefix)),
        client_host_(request.host), sent_host_(client_host_) {
    out_.reserve(out_.size() + 1000); // enough for most heads
    if (config_.behind_trusted_proxy()) {
      const auto named = first_element(request.value("X-Forwarded-Host"));
      if (!named.empty()) { client_host_ = named; }
    }
    // On Vercel, Host names the deployment. The target gets the visitor's host,
    // as from Vercel's own proxies.
    if (config_.on_vercel) { sent_host_ = client_host_; }
    if (sent_host_.empty() && !request.find("Host") && forwarding.target.port) {
      sent_host_ = authority_ = forwarding.target.text();
    }
  }
  HeadWriter(const HeadWriter &) = delete;
  HeadWriter &operator=(const HeadWriter &) = delete;

  // The request that the target gets.
  void write_request() {
    auto target = request_.request_target;
    if (strips_prefix_) { target.remove_prefix(config_.prefix.size()); }
    append(out_, request_.method,
           starts_with(target, "/") || target == "*" ? " " : " /", target,
           " HTTP/1.1\r\n");
    const auto host = request_.find("Host");
    if (!host || host->value != sent_host_) { write("Host", sent_host_); }
    for (const auto &field : request_.fields) {
      if (is_passed_on(field)) { write_request_field(field); }
    }
    write_forwarding_fields();
    // RFC 9110, sections 7.8 and 10.1.4: both have to be listed in Connection.
    const bool trailers =
        request_.minor == 1 && request_.lists({"TE"}, {"trailers"});
    if (trailers) { write("TE", "trailers"); }
    if (request_.upgrades()) { write("Upgrade", request_.protocols); }
    if (request_.upgrades() || trailers) {
      write("Connection", !trailers             ? "Upgrade"
                          : request_.upgrades() ? "Upgrade, TE"
                                                : "TE");
    }
    out_ += "\r\n";
  }

  // Calls `function` with the name and value of each field as own routes and
  // the pre-routing handler see it: the client's, without hop-by-hop fields.
  template <typename F> void for_each_own_field(F function) const {
    if (!sent_host_.empty()) { function("Host", sent_host_); }
    for (const auto &field : request_.fields) {
      // cpp-httplib before 0.27 adds the connection's addresses as fields of
      // these names after the client's, so that a handler would get the
      // client's.
      if (is_passed_on(field) &&
          !is_one_of(field.name, "Host", "REMOTE_ADDR", "REMOTE_PORT",
                     "LOCAL_ADDR", "LOCAL_PORT")) {
        function(field.name, field.value);
      }
    }
  }

  // The request that own routes get: with the client's request target, version
  // and framing.
  void write_own_request() {
    append(out_, request_.method, " ", request_.request_target, " HTTP/1.",
           decimal(request_.minor), "\r\n");
    for_each_own_field([this](std::string_view name, std::string_view value) {
      write(name, value);
    });
    out_ += "\r\n";
  }

  // `keep_alive`: whether the client's connection outlives the response.
  // `server_timing`: a complete header line, or "".
  void write_response(const ResponseHead &response, bool keep_alive,
                      std::string_view server_timing) {
    const bool interim = response.status < 200;
    // A 426 must name the protocols (RFC 9110, section 15.5.22), as a 101 does.
    upgrade_ = response.is_switching() || response.status == 426;
    cached_ = is_cacheable(response);
    cors_ = !config_.cors_origins.empty() && !interim;
    // RFC 9112, section 4: the space is required even without a reason.
    append(out_, "HTTP/1.1 ", response.status_and_reason,
           response.status_and_reason.size() == 3 ? " \r\n" : "\r\n");
    for (const auto &field : response.fields) {
      write_response_field(field, response);
    }
    if (cached_) {
      const auto age = decimal(config_.cdn_cache.count());
      append(out_, "Cache-Control: public, s-maxage=", age, "\r\n");
      append(out_, "CDN-Cache-Control: public, max-age=", age, "\r\n");
      append(out_, "Vercel-CDN-Cache-Control: public, max-age=", age, "\r\n");
    }
    if (cors_) { write_cors(request_, config_, out_); }
    // A CDN would repeat it to everybody.
    if (!interim && !cached_) { out_ += server_timing; }
    if (upgrade_) {
      const bool close = !keep_alive && !response.is_switching();
      write("Connection", close ? "close, Upgrade" : "Upgrade");
    } else {
      write_persistence(request_, keep_alive, out_);
    }
    out_ += "\r\n";
  }

private:
  void write(std::string_view name, std::string_view value) {
    append_field(out_, name, value);
  }

  // Whether a client's field is forwarded. Content-Length, Transfer-Encoding
  // and Host always are, so that a client cannot remove them by listing them in
  // Connection.
  bool is_passed_on(const Field &field) const {
    const auto name = field.name;
    if (is_one_of(name, "Content-Length", "Transfer-Encoding", "Host")) {
      return true;
    }
    if (contains(name, '_')) {
      // To CGI and its like, '_' and '-' are the same in a name.
      std::string plain(name);
      std::replace(plain.begin(), plain.end(), '_', '-');
      if (is_forwarding(plain) || is_vercel_private(plain)) { return false; }
    }
    // CGI makes HTTP_PROXY of "Proxy" ("httpoxy").
    if (is_vercel_private(name) || is_one_of(name, "Proxy", "Warmproxy-Wait")) {
      return false;
    }
    return is_forwarding(name) ? config_.behind_trusted_proxy()
                               : !request_.is_hop_by_hop(field);
  }

  // Writes one field that is_passed_on(), at its original position.
  void write_request_field(const Field &field) {
    if (field.is("Content-Length")) {
      write(field.name, decimal(request_.content_length));
    } else if (field.is("Transfer-Encoding")) {
      write(field.name, "chunked");
    } else if (field.is("Destination") && strips_prefix_) {
      write(field.name, destination_for_target(field.value));
    } else if (!is_replaced(field)) {
      append(out_, field.line, "\r\n");
    }
  }

  // Whether the field is dropped, or replaced by a line written elsewhere.
  bool is_replaced(const Field &field) const {
    return (field.is("Host") && field.value != sent_host_) ||
           (field.is("X-Forwarded-For") && !config_.on_vercel) ||
           (field.is("X-Forwarded-Prefix") && strips_prefix_) ||
           // RFC 9110, section 10.1.1
           (field.is("Expect") && request_.minor == 0);
  }

  // Appends to X-Forwarded-For and -Prefix, and writes the others unless a
  // trusted proxy has set them.
  void write_forwarding_fields() {
    // On Vercel, the peer is the platform.
    if (!config_.on_vercel || is_unset("X-Forwarded-For")) {
      write_joined("X-Forwarded-For", forwarding_.client_address);
    }
    if (is_unset("X-Forwarded-Proto") && is_unset("Forwarded")) {
      out_ += "X-Forwarded-Proto: http\r\n";
    }
    if (is_unset("X-Forwarded-Host") && !request_.host.empty()) {
      write("X-Forwarded-Host", request_.host);
    }
    if (strips_prefix_) { write_joined("X-Forwarded-Prefix", config_.prefix); }
  }

  // Whether no trusted proxy has set this header.
  bool is_unset(std::string_view name) const {
    return !config_.behind_trusted_proxy() || !request_.find(name);
  }

  // Our value after those of trusted proxies, on one line.
  void write_joined(std::string_view name, std::string_view ours) {
    append(out_, name, ": ");
    for (const auto &field : request_.fields) {
      if (config_.behind_trusted_proxy() && field.is(name) &&
          !field.value.empty()) {
        append(out_, field.value, ", ");
      }
    }
    append(out_, ours, "\r\n");
  }

  void write_response_field(const Field &field, const ResponseHead &response) {
    if (field.is("Transfer-Encoding")) {
      // An HTTP/1.0 client gets the body without chunks.
      if (request_.minor == 1) { write(field.name, "chunked"); }
      return;
    }
    if (field.is("Content-Length")) {
      return write(field.name, decimal(response.content_length));
    }
    const bool dropped = field.is("Upgrade")
                             ? !upgrade_
                             : response.is_hop_by_hop(field) || is_ours(field);
    if (dropped) { return; }
    if (field.is("Location") || field.is("Content-Location")) {
      const auto location = client_location(field.value);
      if (location != field.value) { return write(field.name, location); }
    }
    append(out_, field.line, "\r\n");
  }

  // Whether a header of ours replaces it.
  bool is_ours(const Field &field) const {
    return (cached_ &&
            is_one_of(field.name, "Cache-Control", "CDN-Cache-Control",
                      "Vercel-CDN-Cache-Control")) ||
           (cors_ && is_cors_permission(field.name));
  }

  // Whether `cdn_cache` applies. A 304 counts, too: its fields update those
  // of the stored 200. RFC 9111, sections 3 and 3.5.
  bool is_cacheable(const ResponseHead &response) const {
    return config_.cdn_cache.count() > 0 &&
           (response.status == 200 || response.status == 304) &&
           (request_.method == "GET" || request_.method == "HEAD") &&
           is_script_or_style(response) && !request_.find("Authorization") &&
           !response.find("Set-Cookie") &&
           !response.lists({"Vary"}, {"*", "Cookie"}) &&
           !response.lists({"Cache-Control", "CDN-Cache-Control",
                            "Vercel-CDN-Cache-Control"},
                           {"no-store", "private", "no-cache"});
  }

  // Decided by Content-Type; by the path's ending only if there is no specific
  // type, as in a 304.
  bool is_script_or_style(const ResponseHead &response) const {
    const auto type = trim(until(response.value("Content-Type"), ';'));
    if (type.empty() || equals_ignore_case(type, "application/octet-stream")) {
      return ends_with(request_.path(), ".js") ||
             ends_with(request_.path(), ".css");
    }
    return is_one_of(type, "text/javascript", "text/css",
                     "application/javascript", "application/x-javascript");
  }

  // Maps Location and Content-Location to the URL that the client must use.
  std::string client_location(std::string_view location) const {
    const auto uri = split_uri(location);
    if (!uri) { return std::string(location); }
    std::string origin;
    if (!uri->scheme.empty()) {
      if (client_host_.empty() || !names_us(uri->authority)) {
        return std::string(location);
      }
      // A target that redirects to https at our host knows more than we do.
      const bool keeps_scheme = names_our_host(uri->authority) &&
                                !equals_ignore_case(uri->scheme, "http");
      const auto scheme = keeps_scheme ? std::string_view() : client_scheme();
      origin =
          concat(scheme.empty() ? uri->scheme : scheme, "://", client_host_);
    }
    // A target that respects X-Forwarded-Prefix has added the prefix already.
    const bool prefixed =
        !strips_prefix_ || is_below(until(uri->path, '#'), config_.prefix);
    return concat(origin, prefixed ? "" : config_.prefix, uri->path);
  }

  // WebDAV's Destination (RFC 4918, section 10.3): as the target knows it.
  std::string destination_for_target(std::string_view destination) const {
    const auto uri = split_uri(destination);
    if (!uri || !is_below(uri->path, config_.prefix) ||
        (!uri->scheme.empty() && !names_us(uri->authority))) {
      return std::string(destination);
    }
    const auto path = uri->path.substr(config_.prefix.size());
    return concat(destination.substr(0, destination.size() - uri->path.size()),
                  starts_with(path, "/") ? "" : "/", path);
  }

  bool names_our_host(std::string_view authority) const {
    return is_one_of(authority, sent_host_, client_host_);
  }

  // Whether this is our host, or, with the target's port, a name of the
  // machine: some servers put their port into redirects.
  bool names_us(std::string_view authority) const {
    if (authority.empty()) { return false; }
    if (names_our_host(authority)) { return true; }
    const auto port = concat(":", decimal(forwarding_.target.port));
    if (!ends_with(authority, port)) { return false; }
    authority.remove_suffix(port.size());
    return is_one_of(authority, "localhost", "127.0.0.1", "[::1]",
                     without_port(sent_host_), without_port(client_host_));
  }

  // "http", "https", or "" if the proxy in front of us says something else.
  std::string_view client_scheme() const {
    const auto proto = first_element(request_.value("X-Forwarded-Proto"));
    if (!config_.behind_trusted_proxy() ||
        (proto.empty() && is_unset("Forwarded"))) {
      return "http";
    }
    return equals_ignore_case(proto, "https")  ? "https"
           : equals_ignore_case(proto, "http") ? "http"
                                               : "";
  }

  const RequestHead &request_;
  const Forwarding &forwarding_;
  const Config &config_;
  std::string &out_;
  const bool strips_prefix_;
  std::string authority_;        // of the target, for a request without Host
  std::string_view client_host_; // as the client named it to the first proxy
  std::string_view sent_host_;   // the Host that the target gets
  bool upgrade_ = false, cached_ = false, cors_ = false; // of the response
};

// ---- Net: descriptors, the log, clocks --------------------------------------

[[noreturn]] inline void throw_errno(const char *what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// While it exists, all signals are blocked, as in the threads and children that
// are started meanwhile: the program that we are in decides who handles them.
class SignalBlock {
public:
  SignalBlock() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalBlock() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
  sigset_t before_;
};

class Descriptor {
public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor &&other) noexcept : fd_(other.release()) {}
  Descriptor &operator=(Descriptor &&other) noexcept {
    reset(other.release());
    return *this;
  }
  ~Descriptor() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1) {
    if (fd_ >= 0) { ::close(fd_); }
    fd_ = fd;
  }

private:
  int fd_ = -1;
};

// Closes the descriptors from `first` on, at once or on exec.
inline void close_from(int first, bool on_exec) {
#if defined(__linux__) && defined(SYS_close_range)
  const unsigned flags = on_exec ? 4 : 0; // CLOSE_RANGE_CLOEXEC
  if (::syscall(SYS_close_range, first, ~0U, flags) == 0) { return; }
#endif
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  const auto end = static_cast<int>(std::min<rlim_t>(files.rlim_cur, 65536));
  for (int fd = first; fd < end; ++fd) {
    on_exec ? ::fcntl(fd, F_SETFD, FD_CLOEXEC) : ::close(fd);
  }
}

inline bool make_pipe(Descriptor &reading, Descriptor &writing, int flags = 0) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | flags) != 0) { return false; }
  reading.reset(ends[0]);
  writing.reset(ends[1]);
  return true;
}

inline bool would_block(int error) {
  return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}

inline void set_option(int fd, int level, int name, int value) {
  ::setsockopt(fd, level, name, &value, sizeof(value));
}

inline void reset_on_close(int fd) {
  const linger now{1, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

// Ends a connection that another thread may be using; on Linux by a reset,
// which no peer takes for the end of a response.
inline void disconnect(int fd) {
#if defined(__linux__) && defined(SYS_connect)
  // As connect(2) to AF_UNSPEC does. ThreadSanitizer would take that for the
  // start of another socket.
  const sockaddr nobody{};
  if (::syscall(SYS_connect, fd, &nobody, sizeof(nobody)) == 0) { return; }
#endif
  ::shutdown(fd, SHUT_RDWR);
}

// Log lines, from any thread. Never throws. With the default, a pipe or
// terminal that is full does not block: the lines are dropped and counted.
class Log {
public:
  explicit Log(const Options &options) : function_(options.log) {
    struct stat file = {};
    if (function_ || ::fstat(STDERR_FILENO, &file) != 0) { return; }
    // An open file description of our own: O_NONBLOCK on descriptor 2 itself
    // would be shared with the target.
    if (S_ISFIFO(file.st_mode) || S_ISCHR(file.st_mode)) {
      own_.reset(::open("/proc/self/fd/2",
                        O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
    }
  }

  void operator()(std::string_view line) const {
    try {
      if (function_) { return function_(line); }
      const auto dropped = dropped_.exchange(0);
      std::string text;
      if (dropped) {
        append(text, "[warmproxy] ", decimal(dropped),
               " log lines dropped: stderr was full\n");
      }
      append(text, "[warmproxy] ", line, "\n");
      if (!write_text(text)) { dropped_ += dropped + 1; }
    } catch (...) {} // a failure to log must not end the caller
  }
  // For what may occur with every request: logs each distinct line, given in
  // parts, once, and at most 100 of them.
  template <typename... Parts> void once(const Parts &...parts) const {
    try {
      const auto line = concat(parts...);
      std::unique_lock<std::mutex> lock(mutex_);
      if (logged_.size() == 100 || !logged_.insert(line).second) { return; }
      lock.unlock();
      (*this)(line);
    } catch (...) {}
  }

private:
  // In one call, so that lines of several threads and the target do not mix.
  bool write_text(const std::string &text) const {
    pollfd out{own_ ? own_.get() : STDERR_FILENO, POLLOUT, 0};
    ::poll(&out, 1, 0);
    // With POLLERR nobody reads, and a write would raise SIGPIPE.
    return out.revents == POLLOUT &&
           ::write(out.fd, text.data(), text.size()) ==
               static_cast<ssize_t>(text.size());
  }

  const std::function<void(std::string_view)> function_;
  Descriptor own_;
  mutable std::atomic<std::size_t> dropped_{0};
  mutable std::mutex mutex_; // of logged_
  mutable std::set<std::string> logged_;
};

using SteadyClock = std::chrono::steady_clock;

// While RunningClock times anything, no wait may be longer than this.
inline constexpr milliseconds max_wait{1000};

// Time in which this process ran. A platform that freezes instances, a SIGSTOP
// or a suspended laptop must not make a good start or an idle connection time
// out: since every timed wait asks for the time at least once in `max_wait`, a
// silence of more than twice that is a gap, and counts as one `max_wait`.
struct RunningClock {
  using duration = std::chrono::nanoseconds;
  using time_point = std::chrono::time_point<RunningClock>;

  static time_point now() {
    static std::mutex mutex;
    static duration last{0}, running{0};
    const std::lock_guard<std::mutex> lock(mutex);
    const auto real = SteadyClock::now().time_since_epoch();
    const bool is_gap = real - last > 2 * max_wait;
    running += is_gap ? duration(max_wait) : real - last;
    last = real;
    return time_point(running);
  }
};

using Time = RunningClock::time_point;

// At most thirty years, so that "never" can be added to any time.
inline milliseconds clamped(milliseconds time) {
  return std::clamp<milliseconds>(time, milliseconds(0),
                                  std::chrono::hours(24 * 365 * 30));
}

inline Time later(Time from, milliseconds time) { return from + clamped(time); }

inline Time after(milliseconds time) {
  return later(RunningClock::now(), time);
}

// The time left until `until`, at most `max_wait`; -1 ms, no limit, for max().
template <typename T> std::chrono::nanoseconds time_left(T until) {
  if (until == T::max()) { return milliseconds(-1); }
  return std::clamp<std::chrono::nanoseconds>(
      until - T::clock::now(), std::chrono::nanoseconds(0), max_wait);
}

// Waits until one of `fds` is ready or for time_left(until). Returns whether
// one is ready. Not poll(2), which counts in milliseconds: readiness is probed
// every 250 us.
template <typename T> bool wait_for(pollfd *fds, std::size_t count, T until) {
  const auto left = time_left(until);
  const timespec time{static_cast<time_t>(left.count() / 1000000000),
                      static_cast<long>(left.count() % 1000000000)};
  return ::ppoll(fds, static_cast<nfds_t>(count),
                 left.count() < 0 ? nullptr : &time, nullptr) > 0;
}

// ---- Net: connecting to the target

struct SocketAddress {
  SocketAddress() = default;
  explicit SocketAddress(const Endpoint &endpoint) {
    in.sin_family = endpoint.ipv6 ? AF_INET6 : AF_INET;
    in.sin_port = htons(static_cast<std::uint16_t>(endpoint.port));
    size = endpoint.ipv6 ? sizeof(in6) : sizeof(in);
    if (endpoint.ipv6) {
      in6.sin6_addr = in6addr_loopback;
    } else {
      in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    }
  }

  sockaddr *get() { return &any; }
  int port() const { return ntohs(in.sin_port); }
  // The address as text; an IPv4-mapped IPv6 address as plain IPv4.
  std::string text() const {
    char text[INET6_ADDRSTRLEN] = "";
    const void *address = &in.sin_addr;
    if (in.sin_family == AF_INET6) { address = &in6.sin6_addr; }
    ::inet_ntop(in.sin_family, address, text, sizeof(text));
    const bool mapped = starts_with(text, "::ffff:") && contains(text, '.');
    return text + (mapped ? 7 : 0);
  }

  union { // family and port are at the same place for both families
    sockaddr_storage storage{};
    sockaddr any;
    sockaddr_in in;
    sockaddr_in6 in6;
  };
  socklen_t size = sizeof(storage);
};

inline SocketAddress local_address(const Descriptor &socket) {
  SocketAddress address;
  ::getsockname(socket.get(), address.get(), &address.size);
  return address;
}

inline Descriptor new_socket(int family, int flags = 0) {
  return Descriptor(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0));
}

// Starts a connect that does not block. The result may be connected already, or
// become writable when it is (see connect_error()). Returns no descriptor, and
// errno, if the connect failed at once.
inline Descriptor dial(const Endpoint &endpoint) {
  SocketAddress address(endpoint), self;
  auto fd = new_socket(address.in.sin_family, SOCK_NONBLOCK);
  if (!fd || (::connect(fd.get(), address.get(), address.size) != 0 &&
              errno != EINPROGRESS)) {
    return {};
  }
  set_option(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  // A connect to a port in the ephemeral range on which nobody listens can get
  // that very port as its own, and has then met itself. It is reset, or the
  // port would stay taken for a minute.
  ::getsockname(fd.get(), self.get(), &self.size);
  if (std::memcmp(&self.storage, &address.storage, address.size) == 0) {
    reset_on_close(fd.get());
    fd.reset();
    errno = ECONNREFUSED;
  }
  return fd;
}

// Waits up to `timeout` milliseconds for what dial() has just returned, or else
// takes its errno. Returns 0 if it is connected, EINPROGRESS if that takes
// longer, else why it is not.
inline int connect_error(const Descriptor &fd, int timeout) {
  if (!fd) { return errno; }
  pollfd out{fd.get(), POLLOUT, 0};
  if (::poll(&out, 1, timeout) <= 0) { return EINPROGRESS; }
  int error = 0;
  socklen_t size = sizeof(error);
  ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  return error;
}

// Binds a socket to find a port: returns it, or 0 and sets errno.
inline int bindable_port(const Endpoint &endpoint) {
  SocketAddress address(endpoint);
  const auto fd = new_socket(address.in.sin_family);
  const bool bound = fd && ::bind(fd.get(), address.get(), address.size) == 0;
  return bound ? local_address(fd).port() : 0;
}

// A port that is free on 127.0.0.1 and on ::1, as far as the machine has them;
// 0 if there is none.
inline int free_port() {
  for (int attempt = 0; attempt < 100; ++attempt) {
    const int port = bindable_port({false, 0});
    if (!port) { return bindable_port({true, 0}); }
    if (bindable_port({true, port}) || errno != EADDRINUSE) { return port; }
  }
  return 0;
}

// ---- Net: readiness of sockets

class Task;

// A socket that an event loop watches. Readiness is cached: set by an event,
// cleared when a call returns EAGAIN or a short count, so that no speculative
// system calls are made.
struct Socket {
  Descriptor fd;
  Task *owner = nullptr; // runs when there is an event; null: nobody
  bool readable = false;
  bool writable = true;
  bool ended = false;  // before the end or urgent data, recv(2) may stop short
  bool broken = false; // reset, or closed in both directions
};

// Wakes a thread that waits for `socket`. Any thread may call wake(); the
// thread that was woken calls drain().
struct Wakeup {
  Wakeup() {
    if (!make_pipe(socket.fd, writing_, O_NONBLOCK)) { throw_errno("pipe"); }
  }

  void wake() const {
    if (::write(writing_.get(), "", 1) < 0) {} // full: already awake
  }
  void drain() {
    char bytes[64];
    while (::read(socket.fd.get(), bytes, sizeof(bytes)) > 0) {}
    socket.readable = false;
  }
  int fd() const { return socket.fd.get(); }

  Socket socket;

private:
  Descriptor writing_;
};

// Event notification.
//   add     false, and errno, if the kernel has no room for the socket
//   remove  needed even before a close: a child that was just forked holds the
//           socket open until execve(2), and events for it would go on
//   wait    waits for an event or for time_left(until), notes in the sockets
//           what they are ready for, and lists those that had an event
#ifdef __linux__
// Sockets are registered once, edge-triggered, because changing the interest
// set costs as much as a read.
class Poller {
public:
  Poller() {
    if (!epoll_) { throw_errno("epoll_create1"); }
  }
  bool add(Socket &socket) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    event.data.ptr = &socket;
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket.fd.get(), &event) ==
           0;
  }
  void remove(Socket &socket) {
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, socket.fd.get(), nullptr);
  }
  void wait(Time until, std::vector<Socket *> &sockets) {
    epoll_event events[256];
    const auto left = std::chrono::ceil<milliseconds>(time_left(until)).count();
    const int count =
        ::epoll_wait(epoll_.get(), events, 256, static_cast<int>(left));
    for (int i = 0; i < count; ++i) {
      const auto what = events[i].events;
      auto &socket = *static_cast<Socket *>(events[i].data.ptr);
      socket.broken |= (what & (EPOLLHUP | EPOLLERR)) != 0;
      // EPOLLPRI: recv(2) stops short of urgent data as it does of the end.
      socket.ended |= socket.broken || (what & (EPOLLRDHUP | EPOLLPRI));
      socket.readable |= socket.ended || (what & EPOLLIN);
      socket.writable |= socket.broken || (what & EPOLLOUT);
      sockets.push_back(&socket);
    }
  }

private:
  const Descriptor epoll_{::epoll_create1(EPOLL_CLOEXEC)};
};
#else
class Poller {
public:
  bool add(Socket &socket) {
    watched_.push_back(&socket);
    return true;
  }
  void remove(Socket &socket) {
    watched_.erase(std::remove(watched_.begin(), watched_.end(), &socket),
                   watched_.end());
  }
  void wait(Time until, std::vector<Socket *> &sockets) {
    std::vector<pollfd> fds;
    for (const auto socket : watched_) {
      const int wanted =
          (socket->readable ? 0 : POLLIN) | (socket->writable ? 0 : POLLOUT);
      // Exclude a socket that has ended and from which nothing is wanted, or
      // poll() would report POLLHUP forever.
      const bool over = !wanted && socket->ended;
      fds.push_back(
          {over ? -1 : socket->fd.get(), static_cast<short>(wanted), 0});
    }
    wait_for(fds.data(), fds.size(), until);
    for (std::size_t i = 0; i < fds.size(); ++i) {
      const auto what = fds[i].revents;
      auto &socket = *watched_[i];
      if (!what) { continue; }
      socket.broken |= (what & (POLLERR | POLLNVAL)) != 0;
      socket.ended |= socket.broken || (what & POLLHUP);
      socket.readable |= socket.ended || (what & POLLIN);
      socket.writable |= socket.broken || (what & POLLOUT);
      sockets.push_back(&socket);
    }
  }

private:
  std::vector<Socket *> watched_;
};
#endif

// ---- Net: buffers

// Memory for buffers, directly from the kernel: only pages that were ever
// filled are backed by memory, and all of it can be given back, unlike with a
// heap. The most recently used ones are used first, so that they stay in the
// CPU's cache.
class BufferPool {
public:
  struct Unmap {
    void operator()(char *memory) const {
      ::munmap(memory, WARMPROXY_MAX_HEAD_SIZE);
    }
  };
  using Memory = std::unique_ptr<char[], Unmap>;

  BufferPool() { spare_.reserve(max_spare); } // release() must not throw

  Memory take() {
    if (!spare_.empty()) {
      auto memory = std::move(spare_.back());
      spare_.pop_back();
      return memory;
    }
    const auto memory =
        ::mmap(nullptr, WARMPROXY_MAX_HEAD_SIZE, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) { throw std::bad_alloc(); }
    return Memory(static_cast<char *>(memory));
  }
  void release(Memory memory) {
    if (spare_.size() < max_spare) { spare_.push_back(std::move(memory)); }
  }

private:
  static constexpr std::size_t max_spare = 16;

  std::vector<Memory> spare_;
};

// The buffer of one direction, as large as the largest head. It holds memory
// only while it holds bytes.
class Buffer {
public:
  explicit Buffer(BufferPool &pool) : pool_(pool) {}
  ~Buffer() { clear(); }

  std::string_view view() const { return {data_.get() + begin_, size()}; }
  bool empty() const { return begin_ == end_; }
  bool full() const { return size() == WARMPROXY_MAX_HEAD_SIZE; }

  void consume(std::size_t count) {
    begin_ += count;
    if (empty()) { clear(); }
  }
  // Removes the one byte at `position`.
  void erase(std::size_t position) {
    char *at = data_.get() + begin_ + position;
    std::memmove(at, at + 1, size() - position - 1);
    --end_;
    if (empty()) { clear(); }
  }
  void clear() {
    begin_ = end_ = 0;
    if (data_) { pool_.release(std::move(data_)); }
  }
  // `bytes` must fit after the content: nothing is moved to make room.
  void append(std::string_view bytes) {
    if (bytes.empty()) { return; }
    if (!data_) { data_ = pool_.take(); }
    bytes.copy(data_.get() + end_, bytes.size());
    end_ += bytes.size();
  }
  // Appends what has arrived, without waiting. Returns as recv(2) does. Must
  // not be called when full(): without room, recv(2) returns 0 as at the end.
  ssize_t receive(Socket &socket) {
    if (!data_) { data_ = pool_.take(); }
    if (end_ == WARMPROXY_MAX_HEAD_SIZE) {
      std::memmove(data_.get(), data_.get() + begin_, size());
      end_ -= std::exchange(begin_, 0);
    }
    const auto room = std::min<std::size_t>(WARMPROXY_READ_SIZE,
                                            WARMPROXY_MAX_HEAD_SIZE - end_);
    const auto n =
        ::recv(socket.fd.get(), data_.get() + end_, room, MSG_DONTWAIT);
    const int error = errno;
    const auto received = n > 0 ? static_cast<std::size_t>(n) : 0;
    end_ += received;
    // A short count means that there is no more, except for the end of the
    // stream, which triggers no further edge.
    socket.readable = n == 0 || received == room || (n > 0 && socket.ended);
    if (empty()) { clear(); }
    errno = error;
    return n;
  }

private:
  std::size_t size() const { return end_ - begin_; }

  BufferPool &pool_;
  BufferPool::Memory data_;
  std::size_t begin_ = 0, end_ = 0;
};

// ---- Net: the event loop

// Something that an event loop runs when a socket that it owns has an event,
// when its deadline has passed, after Loop::resume(), and, if it was posted,
// after Loop::post() and Loop::notify(). Spurious runs are possible.
class Task {
public:
  enum class Next {
    wait,  // nothing can be done before an event or the deadline
    yield, // run it again after the others had their turn
    close  // it is finished: destroy it (only for tasks that were posted)
  };

  virtual ~Task() = default;
  virtual Next run() = 0;
  virtual Time deadline() const = 0;
  // Called before run() after Loop::resume().
  virtual void resumed() {}

private:
  friend class Loop;
  using Timers = std::multimap<Time, Task *>;

  std::list<std::unique_ptr<Task>>::iterator self_;
  // Holds the task's timer while it is not scheduled; Loop::timers_ does
  // otherwise. Moving the node allocates nothing, so it cannot fail.
  Timers not_scheduled_{{Time::max(), this}};
  Timers::iterator timer_ = not_scheduled_.begin();
};

// One event loop, run by one thread. The tasks posted to it are its own.
class Loop {
public:
  explicit Loop(const Log &log) : log_(log) {
    if (!watch(wakeup_.socket)) { throw_errno("epoll_ctl"); }
  }

  // From any thread:
  void post(std::unique_ptr<Task> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    posted_.push_back(std::move(task));
    posted_.back()->self_ = std::prev(posted_.end());
    ++size_;
    wake();
  }
  // Runs a task, which must not be destroyed before that.
  void resume(Task &task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    resumed_.push_back(&task);
    wake();
  }
  // Runs all tasks posted, since something has changed.
  void notify() {
    notified_ = true;
    wake();
  }
  void wake() { wakeup_.wake(); }
  std::size_t size() const { return size_; } // of the tasks posted

  // From the loop's own thread:
  // Waits once, for an event, a timer or time_left(until), and handles events.
  void turn(Time until) {
    if (!timers_.empty()) { until = std::min(until, timers_.begin()->first); }
    events_.clear();
    poller_.wait(until, events_);
    now_ = RunningClock::now();
    // What has arrived comes before any deadline.
    for (const auto &socket : events_) {
      if (socket && socket->owner) { run(*socket->owner); }
    }
    if (wakeup_.socket.readable) { handle_wakeup(); }
    while (!timers_.empty() && timers_.begin()->first <= now_) {
      auto &task = *timers_.begin()->second;
      unschedule(task);
      run(task);
    }
  }
  Time now() const { return now_; } // when the wait of this turn ended
  bool watch(Socket &socket) { return poller_.add(socket); }
  void forget(Socket &socket) {
    poller_.remove(socket);
    std::replace(events_.begin(), events_.end(), &socket,
                 static_cast<Socket *>(nullptr));
  }
  // Runs the task at `when`, or earlier. A task whose deadline has moved on by
  // then is rescheduled, so a deadline that moves with every request costs
  // nothing.
  void schedule(Task &task, Time when) {
    when = std::max(when, now_ + std::chrono::nanoseconds(1)); // the next turn
    if (when < task.timer_->first) { move_timer(task, timers_, when); }
  }

  BufferPool buffers;
  std::function<void()> on_close; // called when a posted task is gone

private:
  void unschedule(Task &task) {
    move_timer(task, task.not_scheduled_, Time::max());
  }
  void move_timer(Task &task, Task::Timers &to, Time when) {
    auto &from = task.not_scheduled_.empty() ? timers_ : task.not_scheduled_;
    auto node = from.extract(task.timer_);
    node.key() = when;
    task.timer_ = to.insert(std::move(node));
  }

  void handle_wakeup() {
    wakeup_.drain();
    std::vector<Task *> resumed;
    auto next = tasks_.end(); // of those just posted
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!posted_.empty()) { next = posted_.begin(); }
      tasks_.splice(tasks_.end(), posted_);
      resumed.swap(resumed_);
    }
    while (next != tasks_.end()) {
      run(**next++);
    }
    for (const auto task : resumed) {
      task->resumed();
      run(*task);
    }
    if (!notified_.exchange(false)) { return; }
    for (next = tasks_.begin(); next != tasks_.end();) {
      run(**next++);
    }
  }

  void run(Task &task) {
    auto next = Task::Next::close;
    try {
      next = task.run();
    } catch (const std::exception &error) { // no memory, or no room in epoll
      log_.once("connection aborted: ", error.what());
    }
    if (next != Task::Next::close) {
      return schedule(task, next == Task::Next::yield ? now_ : task.deadline());
    }
    unschedule(task);
    tasks_.erase(task.self_); // destroys it
    --size_;
    if (on_close) { on_close(); }
  }

  const Log &log_;
  Poller poller_;
  Wakeup wakeup_;
  std::atomic<bool> notified_{false};
  std::atomic<std::size_t> size_{0};
  std::mutex mutex_; // guards posted_ and resumed_
  std::list<std::unique_ptr<Task>> posted_;
  std::vector<Task *> resumed_;

  Time now_ = RunningClock::now();
  std::vector<Socket *> events_; // of this turn; null: forgotten since
  std::list<std::unique_ptr<Task>> tasks_;
  Task::Timers timers_;
};

// ---- Pool: idle upstream connections and the rules of reuse -----------------

// A connection to the target, in use or idle.
struct Upstream : Socket {
  std::uint64_t generation = 0; // of the target: Status::starts
  // The only client that may use it; null: any; the pool: none (see retire()).
  const Task *client = nullptr;
  bool authenticated = false; // NTLM or Negotiate logged its client in
  Time idle_since{};

  // Whether an idle one has neither been closed nor sent anything.
  bool is_silent() const {
    char byte = 0;
    return ::recv(fd.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 &&
           would_block(errno);
  }
};

// The upstream connections of one event loop. The most recently used idle one
// is reused first: the target is least likely to have closed it.
class UpstreamPool : public Task {
public:
  explicit UpstreamPool(Loop &loop) : loop_(loop) {}

  // Dials a connection on behalf of `user`. Null, and errno, if it failed at
  // once.
  std::unique_ptr<Upstream> open(const Endpoint &endpoint,
                                 std::uint64_t generation, Task &user) {
    auto upstream = std::make_unique<Upstream>();
    upstream->fd = dial(endpoint);
    upstream->generation = generation;
    upstream->owner = &user;
    if (!upstream->fd || !loop_.watch(*upstream)) { return {}; }
    idle_.reserve(++open_); // release() must not throw
    limit();
    return upstream;
  }

  // An idle connection that `client` may use for its next request, or null. A
  // request that is not `repeatable` must not meet a connection that the target
  // is just closing. So it gets one that has been idle for less than
  // `fresh_time`, from a target that is known to leave idle ones open for that
  // long, or one that carries a login, which a new one would lose.
  std::unique_ptr<Upstream> take(Task &client, std::uint64_t generation,
                                 bool repeatable) {
    while (auto upstream = remove_idle(&client)) {
      if (upstream->generation != generation) {
        close(std::move(upstream));
        continue;
      }
      const auto idle = loop_.now() - upstream->idle_since;
      const bool lasts = lasting_generation_ == generation && idle < fresh_time;
      if (!repeatable && !lasts && !upstream->authenticated) {
        retire(std::move(upstream)); // a new one takes its place
        return {};
      }
      // A target that closes an idle connection may send something first, such
      // as a 408, which must not become the response to the next request. It
      // cannot have done so within 20 ms, and a recv(2) for every request would
      // be a fifth of its system calls.
      const bool just_used = idle < milliseconds(20) && !upstream->readable;
      if (!upstream->ended &&
          ((repeatable && just_used) || upstream->is_silent())) {
        upstream->owner = &client;
        return upstream;
      }
      if (idle < fresh_time) { note_early_end(); }
      close(std::move(upstream));
    }
    return {};
  }

  // This target has ended an idle connection early: what was learnt from those
  // that are idle now, or were before, does not count.
  void note_early_end() {
    distrusted_at_ = loop_.now();
    lasting_generation_ = tested_generation_ = 0;
  }

  // Makes a connection idle, for the next request.
  void release(std::unique_ptr<Upstream> upstream) {
    upstream->owner = this;
    upstream->idle_since = loop_.now();
    idle_.push_back(std::move(upstream));
    idle_count_ = idle_.size();
    if (idle_.size() == 1) { loop_.schedule(*this, deadline()); }
  }

  void close(std::unique_ptr<Upstream> upstream) {
    loop_.forget(*upstream);
    --open_;
  }

  // Closes a connection that could be reused but must not be. The first one of
  // each generation stays idle and unused instead, to learn whether the target
  // leaves idle connections open.
  void retire(std::unique_ptr<Upstream> upstream) {
    const auto generation = upstream->generation;
    if (lasting_generation_ == generation || tested_generation_ == generation) {
      return close(std::move(upstream));
    }
    tested_generation_ = generation;
    upstream->client = this;
    release(std::move(upstream));
  }

  // Closes what is private to a client that has gone.
  void close_private(const Task &client) {
    close_idle_if([&client](const Upstream &upstream) {
      return upstream.client == &client;
    });
    limit();
  }

  // From any thread: has the loop close the idle connections, for a target that
  // waits for their end, but none on which a login is under way. idle_count()
  // says how many are left.
  void request_close_idle() {
    close_idle_requested_ = true;
    loop_.resume(*this);
  }
  std::size_t idle_count() const { return idle_count_; }

  Next run() override {
    const bool close_requested = close_idle_requested_.exchange(false);
    close_idle_if([this, close_requested](Upstream &upstream) {
      const auto idle = loop_.now() - upstream.idle_since;
      const bool is_fresh = idle < fresh_time;
      // Whatever a target sends or does on an idle connection ends it.
      upstream.readable = upstream.readable && !upstream.is_silent();
      if (upstream.readable || upstream.ended) {
        if (is_fresh) { note_early_end(); }
        return true;
      }
      if (!is_fresh && upstream.idle_since > distrusted_at_) {
        lasting_generation_ = upstream.generation;
      }
      // Whoever is just logging in needs the same connection once more.
      return (close_requested && !(is_fresh && upstream.authenticated)) ||
             idle >= idle_timeout ||
             (upstream.client == this &&
              lasting_generation_ == upstream.generation);
    });
    return Next::wait;
  }

  Time deadline() const override {
    return idle_.empty() ? Time::max() : loop_.now() + fresh_time;
  }

private:
  // The client's private connection, or else the shared one used last.
  std::unique_ptr<Upstream> remove_idle(const Task *client) {
    for (const Task *wanted : {client, static_cast<const Task *>(nullptr)}) {
      const auto found =
          std::find_if(idle_.rbegin(), idle_.rend(), [=](const auto &upstream) {
            return upstream->client == wanted;
          });
      if (found == idle_.rend()) { continue; }
      auto upstream = std::move(*found);
      idle_.erase(std::next(found).base());
      idle_count_ = idle_.size();
      return upstream;
    }
    return {};
  }

  template <typename Condition> void close_idle_if(Condition condition) {
    for (auto &upstream : idle_) {
      if (condition(*upstream)) { close(std::move(upstream)); }
    }
    idle_.erase(std::remove(idle_.begin(), idle_.end(), nullptr), idle_.end());
    idle_count_ = idle_.size();
  }

  // Closes the oldest idle connections beyond one per client connection plus
  // WARMPROXY_SPARE_UPSTREAMS.
  void limit() {
    const auto most = loop_.size() + WARMPROXY_SPARE_UPSTREAMS;
    if (open_ <= most) { return; }
    close_idle_if([this, most](const Upstream &upstream) {
      return open_ > most && upstream.client != this && !upstream.authenticated;
    });
  }

  // If the target ends a connection that has been idle for less, that is early,
  // and a login on it counts as under way.
  static constexpr milliseconds fresh_time{1000};
  static constexpr milliseconds idle_timeout{WARMPROXY_UPSTREAM_IDLE_TIMEOUT};

  Loop &loop_;
  std::vector<std::unique_ptr<Upstream>> idle_; // the oldest first
  // The generation that leaves idle connections open for `fresh_time`.
  std::uint64_t lasting_generation_ = 0;
  // The generation for which retire() has set one aside to find that out.
  std::uint64_t tested_generation_ = 0;
  Time distrusted_at_{}; // see note_early_end()
  std::size_t open_ = 0; // connections, those in use included
  std::atomic<std::size_t> idle_count_{0};
  std::atomic<bool> close_idle_requested_{false};
};

// ---- Process: finding the program ------------------------------------------

// Makes a start fail with this reason, as what() of a std::runtime_error.
[[noreturn]] inline void fail_start(const std::string &reason) {
  throw std::runtime_error(reason);
}

[[noreturn]] inline void fail_start_at(const std::string &path, int error) {
  fail_start(concat(printable(path), ": ", error_text(error)));
}

inline Descriptor open_file(const std::string &path, int flags) {
  return Descriptor(::open(path.c_str(), flags | O_CLOEXEC, 0600));
}

// Where Options::binary may be, in this order.
inline std::vector<std::string> program_places(const std::string &name) {
  if (contains(name, "/")) {
    std::error_code error; // without /proc, it is the same place twice
    const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
    return {name, self.parent_path() / name};
  }
  const char *path = std::getenv("PATH");
  const auto list = concat(path ? path : "/usr/local/bin:/usr/bin:/bin", ":");
  std::vector<std::string> places;
  for (std::string_view rest = list; !rest.empty();) {
    const auto folder = until(rest, ':'); // empty: the current one
    places.push_back(concat(folder.empty() ? "." : folder, "/", name));
    rest.remove_prefix(folder.size() + 1);
  }
  return places;
}

// Absolute, since the target may run elsewhere; "" if the folder cannot be
// resolved. Symbolic links in the parents are, because of `link/../x`. The last
// component is not: busybox and virtual environments are links that go by their
// names.
inline std::string absolute_path(const std::filesystem::path &place) {
  std::error_code error;
  const auto parent = std::filesystem::canonical(place.parent_path(), error);
  return error ? "" : (parent / place.filename()).string();
}

// ---- Process: why a program cannot be executed

inline std::string read_start(const std::string &path) {
  std::string bytes(4096, '\0');
  const auto file = open_file(path, O_RDONLY);
  const auto n = file ? ::read(file.get(), bytes.data(), bytes.size()) : 0;
  bytes.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  return bytes;
}

// For a file that exists, execve(2) returns ENOENT if the dynamic linker does
// not. An ELF file names it near its start, as "/lib64/ld-linux-x86-64.so.2".
inline std::string explain_linker(const std::string &file) {
  const auto at = file.find("/ld");
  if (at == std::string::npos) { return {}; }
  const std::string linker = file.c_str() + file.rfind('\0', at) + 1;
  return concat("its dynamic linker ", printable(linker),
                " does not exist (it was built for another C library)");
}

inline std::string explain_script(const std::string &file, int error);

// Why the file cannot be executed, as far as it can be seen; "" if nothing is
// seen to be wrong. `error` is what execve(2) returned; 0: it was not called.
inline std::string explain_file(const std::string &path, int error) {
  struct stat status = {};
  if (::stat(path.c_str(), &status) != 0) { return error_text(errno); }
  if (!S_ISREG(status.st_mode)) { return "not a regular file"; }
  if (::access(path.c_str(), X_OK) != 0) {
#ifdef ST_NOEXEC
    struct statvfs system = {};
    if (::statvfs(path.c_str(), &system) == 0 && (system.f_flag & ST_NOEXEC)) {
      return "its file system is mounted with noexec";
    }
#endif
    return "not executable (chmod +x makes it so)";
  }
  const auto file = read_start(path);
  std::string reason;
  if (starts_with(file, "#!")) {
    reason = explain_script(file, error);
  } else if (error == ENOENT) {
    reason = explain_linker(file);
  } else if (error == ENOEXEC) {
    const auto line = until(until(file, '\n'), '\r');
    reason = file.empty() ? "it is empty"
             : has_control(line)
                 ? "it was built for another system or processor"
                 : "it is a script without a #! line";
  }
  return reason.empty() && error ? error_text(error) : reason;
}

// An error that execve(2) returns for a script is its interpreter's.
inline std::string explain_script(const std::string &file, int error) {
  const auto line = trim(until(std::string_view(file).substr(2), '\n'));
  if (ends_with(line, "\r")) {
    return "its first line ends with a carriage return (Windows line ends)";
  }
  const std::string path(line.substr(0, line.find_first_of(" \t")));
  const auto interpreter = concat("its interpreter ", printable(path));
  // Before a start, it is not known where a relative path begins.
  if ((error != 0 || starts_with(path, "/")) &&
      ::access(path.c_str(), F_OK) != 0) {
    return concat(interpreter, " does not exist");
  }
  // ELOOP: it may be a script, and its interpreter this file.
  const auto reason = error && error != ELOOP ? explain_file(path, error) : "";
  return reason.empty() ? "" : concat(interpreter, ": ", reason);
}

// Finds Options::binary: the first place with a file that we may execute, else
// with anything. Throws why it cannot be executed, as far as it can be seen.
inline std::string find_program(const std::string &name) {
  namespace fs = std::filesystem;
  std::string found;
  for (const auto &place : program_places(name)) {
    std::error_code error;
    const auto type = fs::symlink_status(place, error).type();
    const bool exists = type != fs::file_type::not_found;
    const bool executable =
        ::access(place.c_str(), X_OK) == 0 && fs::is_regular_file(place, error);
    if (executable || (exists && found.empty())) { found = place; }
    if (executable) { break; }
  }
  if (found.empty()) {
    const bool by_path = !contains(name, "/");
    fail_start(printable(name) +
               (by_path ? ": not found on PATH" : ": no such file"));
  }
  const auto reason = explain_file(found, 0);
  if (!reason.empty()) { fail_start(concat(printable(found), ": ", reason)); }
  return found;
}

// ---- Process: the scratch copy

inline std::vector<std::string> names_in(const std::string &folder,
                                         std::error_code &error) {
  std::vector<std::string> names;
  std::filesystem::directory_iterator entry(folder, error);
  while (!error && entry != std::filesystem::directory_iterator()) {
    names.push_back(entry->path().filename().string());
    entry.increment(error);
  }
  return names;
}

// `path` without `folder` and "/"; "" if it is not in there.
inline std::string path_within(const std::string &folder,
                               const std::string &path) {
  const auto prefix = ends_with(folder, "/") ? folder : folder + "/";
  return starts_with(path, prefix) ? path.substr(prefix.size()) : "";
}

// One copy of a directory for each release of it, in `scratch/<fingerprint>`.
// It is made under another name and renamed when it is complete, so there are
// no half copies, nothing is overwritten, and an older or newer release is just
// another folder.
class ScratchCopy {
public:
  // `source` is canonical. `check` is called between all steps and may throw,
  // to cancel the copy.
  ScratchCopy(std::string source, const std::string &scratch, const Log &log,
              const std::function<void()> &check)
      : source_(std::move(source)), log_(log), check_(check) {
    const auto path = std::filesystem::absolute(scratch);
    auto folder = path.root_path();
    for (const auto &part : path.relative_path()) {
      folder /= part;
      if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
        fail_start_at(folder, errno);
      }
    }
    scratch_ = std::filesystem::canonical(path);
    // Otherwise another user could replace the program.
    struct stat status = {};
    if (::stat(scratch_.c_str(), &status) != 0 ||
        (status.st_uid != ::geteuid() && status.st_uid != 0)) {
      fail_start(concat(scratch_, ": belongs to another user"));
    }
    if ((status.st_mode & S_IWOTH) && !(status.st_mode & S_ISVTX)) {
      fail_start(concat(scratch_, ": any user may write to it"));
    }
    if (scratch_ == source_) {
      fail_start(concat(scratch_, ": is the directory that is to be copied"));
    }
  }

  ~ScratchCopy() {
    std::error_code ignored;
    if (lock_) { std::filesystem::remove_all(unfinished_, ignored); }
  }

  // Returns the path of the copy. Throws the reason why there is none.
  std::string make() {
    list("");
    const auto copy = concat(scratch_, "/", fingerprint());
    if (exists(copy)) { return copy; }
    make_unfinished();
    copy_all();
    const bool renamed = ::rename(unfinished_.c_str(), copy.c_str()) == 0;
    const int error = errno;
    // Another process may have been faster.
    if (!renamed && !exists(copy)) { fail_start_at(copy, error); }
    log_(concat("copied ", source_, " to ", copy));
    return copy;
  }

private:
  struct Entry {
    std::string path; // relative to `source`
    struct stat status = {};
    std::string link; // what a symbolic link holds
  };

  // Adds what is in `folder` ("" or "a/b/") to entries_.
  void list(const std::string &folder) {
    const auto path = concat(source_, "/", folder);
    std::error_code error;
    const auto names = names_in(path, error);
    if (error) { return skip(path, error.value()); }
    for (const auto &name : names) {
      check_();
      Entry entry;
      entry.path = concat(folder, name);
      const auto from = concat(path, name);
      if (::lstat(from.c_str(), &entry.status) != 0) { skip(from, errno); }
      const auto mode = entry.status.st_mode; // 0: it was left out
      if (S_ISLNK(mode)) { entry.link = std::filesystem::read_symlink(from); }
      // Sockets and the like belong to a process, not to a release.
      if (S_ISLNK(mode) || S_ISREG(mode) ||
          (S_ISDIR(mode) && from != scratch_)) {
        entries_.push_back(std::move(entry));
        if (S_ISDIR(mode)) { list(entries_.back().path + "/"); }
      }
    }
  }

  // Leaves out what cannot be read. Any other error ends the copy.
  void skip(const std::string &path, int error) const {
    if (error == ENOENT) { return; } // it was just removed
    if (error != EACCES && error != EPERM) { fail_start_at(path, error); }
    log_(concat("left out of the scratch copy: ", printable(path), ": ",
                error_text(error)));
  }

  // A hash of the entries, in whatever order. The change time counts and the
  // modification time does not, since deployment tools set the latter to a
  // constant. A folder's times and size change only with its names, which count
  // anyway.
  std::string fingerprint() const {
    std::uint64_t sum = 0;
    const auto add = [&sum](std::string_view text) {
      std::uint64_t hash = 14695981039346656037U; // FNV-1a
      for (const char c : text) {
        hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211U;
      }
      sum += hash ^ (hash >> 32);
    };
    add(source_); // two empty directories are not one release
    for (const auto &[path, status, link] : entries_) {
      const std::string_view end("\0", 1);
      auto text = concat(path, end, link, end, decimal(status.st_mode));
      if (!S_ISDIR(status.st_mode)) {
        append(text, " ", decimal(status.st_size), " ",
               decimal(status.st_ctim.tv_sec), " ",
               decimal(status.st_ctim.tv_nsec));
      }
      add(text);
    }
    char text[17];
    std::snprintf(text, sizeof(text), "%016llx",
                  static_cast<unsigned long long>(sum));
    return text;
  }

  // Whether there is the copy. Fails the start if its name is taken by anything
  // but a folder of ours.
  bool exists(const std::string &copy) const {
    struct stat status = {};
    if (::lstat(copy.c_str(), &status) != 0) { return false; }
    if (!S_ISDIR(status.st_mode) || status.st_uid != ::geteuid()) {
      fail_start(concat(copy, ": not a folder of ours; remove it"));
    }
    return true;
  }

  // Makes the folder for the copy under way. Its lock tells others that we are
  // alive; until it has one, the lock on `scratch` keeps them away. Where
  // folders cannot be locked (NFS), unfinished copies are never removed.
  void make_unfinished() {
    const auto scratch = open_file(scratch_, O_RDONLY | O_DIRECTORY);
    if (!scratch) { fail_start_at(scratch_, errno); }
    while (::flock(scratch.get(), LOCK_EX | LOCK_NB) != 0 &&
           would_block(errno)) {
      check_();
      ::poll(nullptr, 0, 10);
    }
    tidy_up();
    unfinished_ = concat(scratch_, "/.unfinished-XXXXXX");
    if (::mkdtemp(unfinished_.data())) {
      lock_ = open_file(unfinished_, O_RDONLY | O_DIRECTORY);
    }
    if (!lock_) { fail_start_at(unfinished_, errno); }
    ::flock(lock_.get(), LOCK_EX);
  }

  // Removes what dead processes left unfinished. Earlier copies stay, since
  // what the program wrote into one is only in there.
  void tidy_up() const {
    std::error_code ignored;
    for (const auto &name : names_in(scratch_, ignored)) {
      const auto path = concat(scratch_, "/", name);
      if (starts_with(name, ".unfinished-")) {
        const auto folder = open_file(path, O_RDONLY | O_DIRECTORY);
        if (::flock(folder.get(), LOCK_EX | LOCK_NB) != 0) { continue; }
        std::filesystem::remove_all(path, ignored);
        log_(concat("removed the unfinished scratch copy ", path));
      } else if (name.size() == 16 &&
                 name.find_first_not_of("0123456789abcdef") == name.npos) {
        log_(concat("an earlier scratch copy is left where it is: ", path));
      }
    }
  }

  void copy_all() const {
    for (const auto &entry : entries_) {
      check_();
      const auto to = concat(unfinished_, "/", entry.path);
      if (S_ISREG(entry.status.st_mode)) {
        copy_file(concat(source_, "/", entry.path), to);
        continue;
      }
      const int failed = S_ISDIR(entry.status.st_mode)
                             ? ::mkdir(to.c_str(), 0700)
                             : ::symlink(link_text(entry).c_str(), to.c_str());
      if (failed) { fail_start_at(to, errno); }
    }
    // Afterwards, since filling a folder changes its time. The owner may always
    // write, or the copy of a read-only release (Nix) would be read-only, too.
    // A set-user-ID bit meant the owner of the original.
    for (const auto &[path, status, link] : entries_) {
      const auto to = concat(unfinished_, "/", path);
      const mode_t owner = S_ISDIR(status.st_mode) ? S_IRWXU : S_IWUSR;
      const mode_t kept = status.st_uid == ::geteuid() ? 07777 : 01777;
      if (!S_ISLNK(status.st_mode)) {
        ::chmod(to.c_str(), (status.st_mode & kept) | owner);
      }
      const timespec times[] = {status.st_atim, status.st_mtim};
      ::utimensat(AT_FDCWD, to.c_str(), times, AT_SYMLINK_NOFOLLOW);
    }
  }

  void copy_file(const std::string &from, const std::string &to) const {
    const auto reading = open_file(from, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
    if (!reading) { return skip(from, errno); }
    auto writing = open_file(to, O_WRONLY | O_CREAT | O_EXCL);
    if (!writing) { fail_start_at(to, errno); }
    for (off_t at = 0;;) {
      check_();
      const auto data = ::lseek(reading.get(), at, SEEK_DATA);
      if (data < 0 && errno == ENXIO) { break; } // nothing but a hole is left
      at = std::max(at, data);
      const auto hole = ::lseek(reading.get(), at, SEEK_HOLE);
      const auto room = static_cast<std::size_t>(
          std::clamp<off_t>(hole - at, 65536, 8 << 20));
#if defined(__linux__) && defined(SYS_copy_file_range)
      auto from_at = static_cast<loff_t>(at), to_at = from_at;
      if (::syscall(SYS_copy_file_range, reading.get(), &from_at, writing.get(),
                    &to_at, room, 0) > 0) {
        at = to_at;
        continue;
      }
#endif
      std::array<char, 65536> bytes;
      const auto n = ::pread(reading.get(), bytes.data(),
                             std::min(room, bytes.size()), at);
      if (n < 0) { fail_start_at(from, errno); }
      if (n == 0) { break; }
      const auto written = ::pwrite(writing.get(), bytes.data(),
                                    static_cast<std::size_t>(n), at);
      if (written <= 0) { fail_start_at(to, errno); }
      at += written; // after a partial one, the next one fails with the reason
    }
    const auto size = ::lseek(reading.get(), 0, SEEK_END);
    if (::ftruncate(writing.get(), size) != 0 ||
        ::close(writing.release()) != 0) {
      fail_start_at(to, errno);
    }
  }

  // What a symbolic link holds in the copy: a relative one must still find its
  // file if it leaves the directory ("../lib"), or leaves and enters it again
  // ("../app/lib"). The text alone does not show that, since the kernel
  // resolves links on the way.
  std::string link_text(const Entry &entry) const {
    const std::filesystem::path path = entry.path, link = entry.link;
    const auto folder = source_ / path.parent_path();
    const auto absolute = folder / link;
    const bool is_parent = absolute.filename() == "..";
    std::error_code error;
    // The folder of what it points to; for "..", that folder itself.
    auto real = std::filesystem::weakly_canonical(
        is_parent ? absolute : absolute.parent_path(), error);
    if (real != source_ && path_within(source_, real.string()).empty()) {
      return absolute.string();
    }
    const auto text = (path.parent_path() / link).lexically_normal();
    if (text.empty() || *text.begin() != "..") { return entry.link; }
    if (!is_parent) { real /= absolute.filename(); }
    return real.lexically_relative(folder).string();
  }

  const std::string source_;
  const Log &log_;
  const std::function<void()> &check_;
  std::string scratch_;        // canonical
  std::vector<Entry> entries_; // a folder comes before what it holds
  std::string unfinished_;     // the copy under way
  Descriptor lock_;
};

// ---- Process: what is run

struct Program {
  std::string path;      // absolute
  std::string argv0;     // as seen from `directory`
  std::string directory; // absolute
  bool moves = false;    // `directory` is not the current one

  // What to execute from `directory`: the kernel tells a script its path in
  // place of argv[0].
  const std::string &file() const {
    return contains(argv0, "/") ? argv0 : path;
  }
};

// argv[0] has to lead from the working directory to the file that runs: virtual
// environments and programs that keep data beside themselves find their place
// by it. The name is passed on as it was given if it does. Otherwise it is
// "./..." inside the directory (below /tmp, PocketBase takes an absolute path
// for `go run`), and absolute elsewhere.
inline std::string argv0_for(const Program &program, const Config &config,
                             const std::string &place,
                             const std::string &within) {
  const auto &given = config.binary;
  const bool by_path = !contains(given, "/"); // the target looks there, too
  const bool same_path = !by_path || !config.env.count("PATH");
  const auto seen =
      std::filesystem::path(program.directory) / (by_path ? place : given);
  if (same_path && absolute_path(seen) == program.path) { return given; }
  return within.empty() ? program.path : concat("./", within);
}

// Finds the program, and makes its scratch copy where one is asked for.
inline Program prepare_program(const Config &config, const Log &log,
                               const std::function<void()> &check) {
  const auto place = find_program(config.binary);
  Program program;
  program.path = absolute_path(place);
  std::error_code error;
  // Not resolved, and not changed to: we may not be permitted to enter it
  // again.
  const auto current = std::filesystem::current_path(error).string();
  program.directory = current;
  if (!config.directory.empty()) {
    program.directory = std::filesystem::canonical(config.directory, error);
  }
  if (error) {
    const auto &wanted = config.directory;
    fail_start_at(wanted.empty() ? "the current directory"
                                 : concat("directory ", wanted),
                  error.value());
  }
  const auto within = path_within(program.directory, program.path);
  if (!config.scratch.empty()) {
    program.directory =
        ScratchCopy(program.directory, config.scratch, log, check).make();
    if (!within.empty()) {
      program.path = concat(program.directory, "/", within);
    }
  }
  program.moves = program.directory != current;
  program.argv0 = argv0_for(program, config, place, within);
  return program;
}

// HOST, and HOSTNAME, which Docker sets, make some servers listen on other
// addresses than loopback. LISTEN_* (systemd) and NODE_CHANNEL_* (a parent that
// is Node, such as pm2) name descriptors, which the target does not inherit.
// The others are meant for us.
inline bool is_inherited(std::string_view name) {
  for (const std::string_view kept_back :
       {"HOST", "HOSTNAME", "VERCEL_IPC_PATH", "LISTEN_FDS", "LISTEN_FDNAMES",
        "LISTEN_PID", "NODE_CHANNEL_FD", "NODE_CHANNEL_SERIALIZATION_MODE"}) {
    if (name == kept_back) { return false; }
  }
  return !starts_with(name, "WARMPROXY_");
}

// The target's environment: "NAME=value" by NAME.
inline std::map<std::string, std::string>
environment_for(const Config &config, const std::string &directory,
                const std::string &port) {
  std::map<std::string, std::string> variables;
  for (auto variable = environ; variable && *variable; ++variable) {
    const std::string name(until(*variable, '='));
    if (is_inherited(name)) { variables[name] = *variable; }
  }
  variables["PORT"] = concat("PORT=", port);
  variables["PWD"] = concat("PWD=", directory);
  for (auto [name, value] : config.env) {
    replace_all(value, "{port}", port);
    variables[name] = concat(name, "=", value);
  }
  return variables;
}

// ---- Process: the watchdog

// A descriptor that polls readable when the process has exited; -1: none.
inline int open_pidfd(pid_t pid) {
#if defined(__linux__) && defined(SYS_pidfd_open)
  return static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
#else
  return static_cast<void>(pid), -1;
#endif
}

// Kills the target's process group if we are killed: PR_SET_PDEATHSIG reaches
// the target alone, not what it has forked.
class Watchdog {
public:
  Watchdog() {
    const Descriptor self(open_pidfd(::getpid()));
    Descriptor reading;
    const SignalBlock block;
    pid_ = make_pipe(reading, writing_) ? ::fork() : -1;
    if (pid_ == 0) { run(reading.get(), self.get()); }
    if (pid_ < 0) { throw_errno("watchdog process"); }
  }
  ~Watchdog() {
    watch(-1);
    while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {}
  }

  // Sets the group to kill; 0: none, -1: the watchdog ends.
  void watch(pid_t group) const {
    if (::write(writing_.get(), &group, sizeof(group)) < 0) {}
  }

private:
  // The end of the pipe means that we are gone. The pidfd says so, too, since a
  // child that the embedding program has forked may hold the pipe open.
  [[noreturn]] static void run(int pipe, int parent) {
    ::setsid(); // whoever kills our process group must not kill this first
    ::dup2(pipe, 0);
    parent = ::dup2(parent, 1);
    close_from(parent < 0 ? 1 : 2, false);
    pid_t group = 0;
    while (group >= 0) {
      pollfd fds[] = {{0, POLLIN, 0}, {parent, POLLIN, 0}};
      if (::poll(fds, 2, -1) < 0) { continue; }
      if (!fds[0].revents ||
          ::read(0, &group, sizeof(group)) != sizeof(group)) {
        break;
      }
    }
    if (group > 0) { ::kill(-group, SIGKILL); }
    ::_exit(0);
  }

  Descriptor writing_;
  pid_t pid_ = -1;
};

// ---- Process: its process group, by /proc

// Calls `function` with the pid of each process of a group, but for zombies.
// Returns false if /proc cannot be read.
template <typename F> bool for_each_member(pid_t group, F function) {
  std::error_code error;
  // It may be that of another PID namespace.
  const auto self = std::filesystem::read_symlink("/proc/self", error);
  if (self != decimal(::getpid())) { return false; }
  const auto names = names_in("/proc", error);
  if (error) { return false; } // we may lack descriptors
  for (const auto &name : names) {
    pid_t pid = 0;
    if (!to_number(name, pid) || ::getpgid(pid) != group) { continue; }
    const auto text = read_start(concat("/proc/", name, "/stat"));
    const auto end = text.rfind(") "); // the program's name may have one, too
    // What cannot be read may be alive.
    const char state = end == std::string::npos ? '?' : text[end + 2];
    // Where only its first thread has ended, the others still hold its sockets.
    const bool is_zombie =
        state == 'Z' &&
        names_in(concat("/proc/", name, "/task"), error).size() < 2;
    if (!is_zombie && state != 'X') { function(pid); }
  }
  return true;
}

struct ListeningSocket {
  std::string address; // "0.0.0.0", "::1"
  int port = 0;
  bool reachable = false; // bound to the loopback address or to any address
  bool ipv6 = false;
  std::string program; // the name of a process that has it
};

// An address of /proc/net/tcp: hexadecimal words in the machine's byte order.
inline std::string address_from_hex(const std::string &hex) {
  std::array<unsigned, 4> words{};
  std::sscanf(hex.c_str(), "%8x%8x%8x%8x", &words[0], &words[1], &words[2],
              &words[3]);
  SocketAddress address(Endpoint{hex.size() > 8, 0});
  void *bytes = &address.in.sin_addr;
  if (hex.size() > 8) { bytes = &address.in6.sin6_addr; }
  std::memcpy(bytes, words.data(), hex.size() / 2);
  return address.text();
}

// The sockets of a process group as /proc/PID/fd has them, "socket:[123]", each
// with the name of a process that has it.
inline std::map<std::string, std::string> sockets_of(pid_t group) {
  std::map<std::string, std::string> sockets;
  for_each_member(group, [&](pid_t pid) {
    const auto process = concat("/proc/", decimal(pid));
    const auto comm = read_start(process + "/comm");
    std::error_code error;
    for (const auto &fd : names_in(process + "/fd", error)) {
      const auto link =
          std::filesystem::read_symlink(concat(process, "/fd/", fd), error);
      if (starts_with(link.native(), "socket:")) {
        sockets.emplace(link, printable(std::string(until(comm, '\n'))));
      }
    }
  });
  return sockets;
}

// The listening sockets of a group; several may have the same port. None if
// /proc cannot be read, and for group 0, in which /proc has the processes of
// other namespaces.
inline std::vector<ListeningSocket> listeners_of(pid_t group) {
  std::vector<ListeningSocket> found;
  if (group == 0) { return found; }
  const auto sockets = sockets_of(group);
  if (sockets.empty()) { return found; } // the tables take milliseconds to read
  // Our own network's tables: what is in another cannot be connected to.
  for (const auto table : {"/proc/self/net/tcp", "/proc/self/net/tcp6"}) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(
        std::fopen(table, "re"), std::fclose);
    char line[512];
    while (file && std::fgets(line, sizeof(line), file.get())) {
      char local[33] = "";
      unsigned port = 0, state = 0;
      unsigned long inode = 0;
      const int fields = std::sscanf(
          line,
          " %*d: %32[0-9A-F]:%x %*[0-9A-F]:%*x %x %*x:%*x %*x:%*x %*x %*u %*u "
          "%lu",
          local, &port, &state, &inode);
      if (fields != 4) { continue; } // the heading
      // Those that listen come first, and thousands of others may follow.
      const unsigned syn_received = 0x03, listening = 0x0a;
      if (state != listening && state != syn_received) { break; }
      const auto it = sockets.find(concat("socket:[", decimal(inode), "]"));
      if (state != listening || it == sockets.end()) { continue; }
      const auto address = address_from_hex(local);
      const bool reachable =
          is_one_of(address, "0.0.0.0", "127.0.0.1", "::", "::1");
      found.push_back({address, static_cast<int>(port), reachable,
                       contains(address, ":"), it->second});
    }
  }
  return found;
}

// ---- Process: one run of the program

// One run of the program at a time. For one thread alone, except pid(),
// started() and owns().
class Process {
public:
  // Starts the watchdog process. Throws std::system_error.
  Process(const Config &config, const Log &log) : config_(config), log_(log) {
    ::getrlimit(RLIMIT_NOFILE, &files_);
  }

  // Starts the program, or throws the reason why it cannot be started. `check`
  // is called during long work (the scratch copy, and while the program's file
  // is still being written) and may throw, to cancel the start.
  void start(int port, const std::function<void()> &check) {
    exit_text_.clear();
    auto program = prepare_program(config_, log_, check);
    const auto port_text = decimal(port);
    std::vector<char *> argv{program.argv0.data()}, envp;
    auto arguments = config_.args;
    for (auto &argument : arguments) {
      replace_all(argument, "{port}", port_text);
      argv.push_back(argument.data());
    }
    argv.push_back(nullptr);
    auto environment = environment_for(config_, program.directory, port_text);
    for (auto &[name, text] : environment) {
      envp.push_back(text.data());
    }
    envp.push_back(nullptr);
    while (const int error = spawn(program, argv.data(), envp.data())) {
      if (error != ETXTBSY) {
        fail_start(concat(printable(program.path), ": ",
                          explain_file(program.path, error)));
      }
      check(); // its file is still being written
      ::poll(nullptr, 0, 20);
    }
  }
  // From start() until stop() has returned, though it may have exited().
  bool started() const { return pid_ != 0; }
  // The target's pid, which is its process group's id, too; 0: none.
  pid_t pid() const { return pid_; }
  // Whether `pid` is the target, which is reaped here.
  bool owns(pid_t pid) const { return pid == pid_; }
  // Polls readable when the target exits. -1: poll exited() every 10 ms.
  int exit_fd() const { return pidfd_.get(); }

  // Whether the target, if started, has exited. Reaps it.
  bool exited() {
    if (!started()) { return false; }
    if (!exit_text_.empty()) { return true; }
    int status = 0;
    const auto reaped = ::waitpid(pid_, &status, WNOHANG);
    if (reaped == 0) { return false; }
    if (reaped < 0) { // the program we are in ignores SIGCHLD, or has reaped it
      exit_text_ = "ended";
    } else if (WIFSIGNALED(status)) {
      exit_text_ = concat("was killed by signal ", decimal(WTERMSIG(status)));
    } else {
      exit_text_ = concat("exited with status ", decimal(WEXITSTATUS(status)));
    }
    pidfd_.reset();
    return true;
  }
  // "exited with status 1", "was killed by signal 9". Stays until start().
  const std::string &exit_text() const { return exit_text_; }
  // What exit_text() may mean for a target that was not up yet, or has left
  // others of its group, as " (...)" or "".
  std::string exit_hint() const {
    return exit_text_ == "exited with status 0"
               ? " (it must stay in the foreground: a program that puts itself "
                 "in the background cannot be watched)"
               : "";
  }

  // Ends the target and its process group, or what a target that has exited
  // left of it. Blocks, until a second after `deadline` at the latest.
  void stop(SteadyClock::time_point deadline) {
    if (!started()) { return; }
    end_politely(deadline);
    if (!group_ended()) {
      const bool permitted = ::kill(-pid_, SIGKILL) == 0 || errno != EPERM;
      // The kernel needs a moment, and so does init, to reap them.
      wait(SteadyClock::now() + seconds(permitted ? 1 : 0),
           &Process::group_ended);
      if (!group_ended()) {
        log_(concat("target (pid ", decimal(pid()), ") cannot be ended: ",
                    permitted ? "it survives SIGKILL" : error_text(EPERM)));
      }
    }
    if (exit_text_.empty()) { exit_text_ = "could not be ended"; }
    watchdog_.watch(0);
    pidfd_.reset();
    pid_ = 0;
  }

private:
  // Returns the error; 0: the program runs.
  int spawn(const Program &program, char *const *argv, char *const *envp) {
    Descriptor reading, writing;
    if (!make_pipe(reading, writing)) { return errno; }
    const pid_t self = ::getpid();
    const SignalBlock block; // no signal handler of ours may run in the child
    const pid_t pid = ::vfork();
    if (pid == 0) { become_target(program, argv, envp, writing.get(), self); }
    int error = pid < 0 ? errno : 0;
    if (pid < 0) { return error; }
    pid_ = pid;
    writing.reset();
    // Ready already, unless another thread has just forked a child that holds
    // the writing end.
    pollfd fd{reading.get(), POLLIN, 0};
    if (::poll(&fd, 1, 1000) > 0 &&
        ::read(reading.get(), &error, sizeof(error)) > 0) {
      while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {}
      watchdog_.watch(0);
      pid_ = 0;
    } else {
      pidfd_.reset(open_pidfd(pid));
    }
    return error;
  }

  // Runs in the child, in our memory: between vfork(2) and execve(2) it may
  // neither allocate nor lock. `report` takes an errno, or is closed by
  // execve(2).
  [[noreturn]] void become_target(const Program &program, char *const *argv,
                                  char *const *envp, int report, pid_t parent) {
    // Its own process group, and no terminal: a background group would be
    // stopped when it uses that. Without one, it stays in our session: Linux
    // schedules sessions against each other, which costs a tenth of the rate.
    ::open("/dev/tty", O_RDONLY | O_CLOEXEC) < 0 ? ::setpgid(0, 0) : ::setsid();
    pid_ = ::getpid(); // before it can end: as PID 1 we reap what is not owned
#ifdef __linux__
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (::getppid() != parent) { ::_exit(127); } // we died just before
    watchdog_.watch(pid_);
    // Default actions, since cpp-httplib ignores SIGPIPE. SIG_IGN first
    // discards signals that came while the child was still in our own process
    // group.
    for (int number = 1; number < NSIG; ++number) {
      ::signal(number, SIG_IGN);
      ::signal(number, SIG_DFL);
    }
    sigset_t none;
    ::sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::close(0); // so that open(2) returns 0, even at the limit on descriptors
    ::open("/dev/null", O_RDONLY);
    close_from(3, true);
    ::setrlimit(RLIMIT_NOFILE, &files_);
    if (!program.moves || ::chdir(program.directory.c_str()) == 0) {
      ::execve(program.file().c_str(), argv, envp);
    }
    const int error = errno;
    if (::write(report, &error, sizeof(error)) < 0) {}
    ::_exit(127);
  }

  // Whether the target and all of its process group have ended.
  bool group_ended() {
    if (!exited()) { return false; }
    // Where we are the first process of a container, its orphans are ours.
    while (::waitpid(-pid_, nullptr, WNOHANG) > 0) {}
    if (::kill(-pid_, 0) != 0) { return errno == ESRCH; }
    // Zombies count for kill(2), and the first process of many a container
    // never reaps its orphans.
    bool alive = false;
    return for_each_member(pid_, [&](pid_t) { alive = true; }) && !alive;
  }

  void wait(SteadyClock::time_point until, bool (Process::*condition)()) {
    while (!(this->*condition)() && SteadyClock::now() < until) {
      pollfd fd{exit_fd(), POLLIN, 0};
      ::poll(&fd, 1, 5);
    }
  }

  // SIGTERM goes to the target alone at first: launchers (npm, cross-env) pass
  // it on, and a second one makes many servers exit at once. A plain shell dies
  // without passing it on, so the rest of the group gets its own SIGTERM: after
  // a tenth of the remaining time (a second at most) when the target has
  // exited, or at half time.
  void end_politely(SteadyClock::time_point deadline) {
    if (!exited()) {
      ::kill(pid_, SIGTERM);
      ::kill(-pid_, SIGCONT); // so that a stopped process receives it
      auto now = SteadyClock::now();
      wait(now + (deadline - now) / 2, &Process::exited);
      now = SteadyClock::now();
      const auto tenth =
          std::min<SteadyClock::duration>((deadline - now) / 10, seconds(1));
      if (exited()) { wait(now + tenth, &Process::group_ended); }
    }
    if (group_ended()) { return; }
    const bool listed = for_each_member(pid_, [&](pid_t pid) {
      if (pid != pid_) { ::kill(pid, SIGTERM); }
    });
    if (!listed) { ::kill(-pid_, SIGTERM); }
    wait(deadline, &Process::group_ended);
  }

  const Config &config_;
  const Log &log_;
  rlimit files_{}; // as we were given it: serve() takes more for itself
  Watchdog watchdog_;
  std::atomic<pid_t> pid_{0};
  Descriptor pidfd_;
  std::string exit_text_; // empty: it has not exited
};

// ---- Supervisor: the readiness probe

// How long to wait after a refused connect. One costs 15 us, so one every 250
// us takes 6 % of a core. The pause grows to 2 ms, which is then the most that
// readiness is noticed late.
inline Time::duration connect_pause(Time::duration elapsed) {
  return std::clamp<Time::duration>(
      elapsed / 2000, std::chrono::microseconds(250), milliseconds(2));
}

// One GET of a path, from the connect to the head of the final response; with
// an empty path, only the connect. Redirects to the same server are followed:
// Prometheus and others redirect `/` to a page that answers 503 until they are
// ready, so what counts is where a browser would end.
class ProbeAttempt {
public:
  enum class State {
    connecting,
    asked,         // connected: the request has been sent
    no_connection, // mostly, nobody listens
    no_response,   // or none that is HTTP
    not_yet,       // answered with 502, 503 or 504
    ready
  };

  ProbeAttempt() = default; // one that could not be made
  // Asks the first of `endpoints` that accepts a connection.
  ProbeAttempt(std::vector<Endpoint> endpoints, std::string path,
               std::string host, Time now)
      : endpoints_(std::move(endpoints)), path_(std::move(path)),
        host_(std::move(host)), state_(State::connecting),
        seen_("its backlog is full"), began_at_(now) {}

  // Goes on as far as it can without waiting.
  void advance(Time now) {
    while (state_ == State::connecting ? connect() : receive()) {}
    if (now >= deadline()) { fd_.reset(); }
  }
  State state() const { return state_; }
  bool is_open() const { return state_ <= State::asked; }
  const std::string &seen() const { return seen_; } // for people to read
  const Endpoint &endpoint() const { return endpoints_.front(); }
  Time began_at() const { return began_at_; }
  Time ended_at() const { return ended_at_; }
  // When another one may be asked, in a series that began at `began`.
  Time next_at(Time began) const {
    if (state_ == State::connecting) { return Time::max(); }
    if (state_ == State::asked) {
      return later(began_at_, milliseconds(WARMPROXY_PROBE_PATIENCE));
    }
    // One that was answered costs the target much more than a connect.
    const auto pause = connect_pause(ended_at_ - began);
    return ended_at_ + (state_ == State::no_connection ? pause : 40 * pause);
  }
  // What to wait for.
  pollfd event() const {
    const bool connecting = state_ == State::connecting;
    return {fd_.get(), static_cast<short>(connecting ? POLLOUT : POLLIN), 0};
  }
  // The rest of a response has a second: many servers log an error if the
  // connection is closed before.
  Time deadline() const {
    return fd_ && !is_open() ? later(ended_at_, seconds(1)) : Time::max();
  }

private:
  // Like receive(), returns whether to go on.
  bool connect() {
    if (!fd_) { fd_ = dial(endpoint()); }
    const int error = connect_error(fd_, 0);
    if (error == EINPROGRESS) { return false; }
    if (error == 0) { return send_request(); }
    fd_.reset();
    if (error_ == 0) { error_ = error; }
    if (endpoints_.size() > 1) {
      endpoints_.erase(endpoints_.begin());
      return true;
    }
    auto text = error_text(error_);
    text[0] = to_lower(text[0]);
    return end(State::no_connection, std::move(text));
  }

  bool send_request() {
    if (path_.empty()) {
      fd_.reset();
      return end(State::ready, "connected");
    }
    state_ = State::asked;
    seen_ = concat("no answer to GET ", path_);
    const auto request = concat("GET ", path_, " HTTP/1.1\r\nHost: ", host_,
                                "\r\nUser-Agent: warmproxy/" WARMPROXY_VERSION
                                "\r\nAccept: */*\r\n\r\n");
    const auto n = ::send(fd_.get(), request.data(), request.size(),
                          MSG_DONTWAIT | MSG_NOSIGNAL);
    return n == static_cast<ssize_t>(request.size()) ||
           end_without_response("connection closed");
  }

  bool receive() {
    if (!fd_) { return false; }
    char bytes[16384];
    const auto n = ::recv(fd_.get(), bytes, sizeof(bytes), MSG_DONTWAIT);
    if (n < 0 && would_block(errno)) { return false; }
    if (n <= 0) {
      fd_.reset();
      return is_open() && end_without_response("connection closed");
    }
    const std::string_view arrived(bytes, static_cast<std::size_t>(n));
    if (!is_open()) { return skip(arrived); }
    received_ += arrived;
    return read_response();
  }

  bool read_response() {
    while (const auto size = head_end(received_)) {
      ResponseHead response;
      const auto refusal =
          parse_response(received_.substr(0, size), "GET", response);
      received_.erase(0, size);
      if (refusal) {
        return end_without_response(concat("malformed: ", refusal.reason));
      }
      if (response.status >= 200) { return judge(response); }
    }
    return received_.size() < WARMPROXY_MAX_HEAD_SIZE ||
           end_without_response("its head is too large");
  }

  bool judge(const ResponseHead &response) {
    const auto status = response.status;
    if (auto path = redirect_path(response); !path.empty()) {
      ++redirects_;
      path_ = std::move(path);
      endpoints_.resize(1);
      fd_.reset();
      received_.clear();
      state_ = State::connecting;
      return true;
    }
    end(status >= 502 && status <= 504 ? State::not_yet : State::ready,
        concat("GET ", path_, " answered ", decimal(status)));
    rest_ = response.framing;
    return skip(received_);
  }

  // Where a redirect leads on this server; "" if it does not, or this is none.
  std::string redirect_path(const ResponseHead &response) const {
    if (response.status < 300 || response.status > 399 || redirects_ == 5) {
      return {};
    }
    const auto location = until(response.value("Location"), '#');
    const auto uri = split_uri(location);
    const bool here =
        uri && (uri->scheme.empty() ||
                (equals_ignore_case(uri->scheme, "http") &&
                 is_one_of(uri->authority, host_, endpoint().text(),
                           concat("localhost:", decimal(endpoint().port)))));
    if (!here) { return {}; }
    return concat(starts_with(uri->path, "/") ? "" : "/", uri->path);
  }

  bool skip(std::string_view bytes) {
    std::string content; // given, take() goes on after superfluous blanks
    rest_.take(bytes, &content);
    if (rest_.done() || rest_.malformed()) { fd_.reset(); }
    return true;
  }

  bool end_without_response(std::string_view why) {
    fd_.reset();
    return end(State::no_response,
               concat("no answer to GET ", path_, " (", why, ")"));
  }

  bool end(State state, std::string seen) {
    state_ = state;
    seen_ = std::move(seen);
    ended_at_ = RunningClock::now();
    return false;
  }

  std::vector<Endpoint> endpoints_; // the one in use, then those left to try
  std::string path_, host_;
  Descriptor fd_;
  State state_ = State::no_connection;
  int error_ = 0; // of the first endpoint
  std::string seen_ = "no single listening port found";
  Time began_at_{}, ended_at_{};
  std::string received_;
  int redirects_ = 0;
  Framing rest_; // of the final response
};

// The attempts at one target, until one shows that it is ready. An attempt that
// the target has accepted is never given up: on a server with one thread the
// next one would only wait behind it. After WARMPROXY_PROBE_PATIENCE one more
// is put beside it, for a worker that died with the first.
class Probe {
public:
  using State = ProbeAttempt::State;

  // Without endpoints, no attempt can be made.
  explicit Probe(std::vector<Endpoint> endpoints = {})
      : endpoints_(std::move(endpoints)) {}

  void ask(std::string path, std::string host, Time now) {
    if (latest_.is_open()) { earlier_ = std::move(latest_); }
    latest_ = {endpoints_, std::move(path), std::move(host), now};
    advance(now);
  }

  // Goes on as far as it can without waiting.
  void advance(Time now) {
    for (auto *attempt : {&earlier_, &latest_}) {
      attempt->advance(now);
      if (attempt->state() == State::not_yet) {
        not_yet_ = attempt->seen();
        not_yet_at_ = attempt->ended_at();
      }
    }
    if (latest_.state() == State::no_connection) { not_yet_.clear(); }
    if (earlier_.state() == State::ready) { std::swap(earlier_, latest_); }
    if (is_ready() || !earlier_.is_open()) { earlier_ = {}; }
  }

  const ProbeAttempt &latest() const { return latest_; }
  bool is_ready() const { return latest_.state() == State::ready; }
  bool is_open() const { return earlier_.is_open() || latest_.is_open(); }
  // The latest 502 to 504, as text; "" if it is older than
  // WARMPROXY_PROBE_PATIENCE, or a connection was refused since. A later
  // attempt that failed otherwise may have had a Host that the target does not
  // serve.
  std::string not_yet(Time now) const {
    const milliseconds patience(WARMPROXY_PROBE_PATIENCE);
    return now < later(not_yet_at_, patience) ? not_yet_ : "";
  }
  // When the next attempt is due. A target that is not being asked at the
  // deadline is asked once more.
  Time ask_at(Time deadline) const {
    const bool both_open = earlier_.is_open() && latest_.is_open();
    if (endpoints_.empty() || is_ready() || both_open) { return Time::max(); }
    const auto next =
        std::max(earlier_.next_at(began_), latest_.next_at(began_));
    const bool was_last = latest_.began_at() >= deadline;
    return is_open() || was_last ? next : std::min(next, deadline);
  }
  void add_events(std::vector<pollfd> &events, Time &until) const {
    for (const auto *attempt : {&earlier_, &latest_}) {
      events.push_back(attempt->event());
      until = std::min(until, attempt->deadline());
    }
  }

private:
  std::vector<Endpoint> endpoints_;
  ProbeAttempt earlier_; // one that is still open beside the latest, if any
  ProbeAttempt latest_;
  std::string not_yet_; // see not_yet()
  Time not_yet_at_{};
  Time began_ = RunningClock::now();
};

// Where all these sockets listen, if they have the same port; port 0 if there
// are several ports, or none that can be reached. Several are never chosen
// from, since one may be a debugger.
inline Endpoint only_endpoint(const std::vector<ListeningSocket> &sockets) {
  Endpoint found;
  for (const auto &socket : sockets) {
    if (socket.port != sockets.front().port) { return {}; }
    if (socket.reachable && (!found.port || !socket.ipv6)) {
      found = {socket.ipv6, socket.port};
    }
  }
  return found;
}

// ---- Supervisor -------------------------------------------------------------

// Why a request cannot have the target.
struct Failure {
  int status = 0; // of the response
  std::string reason;
  milliseconds retry_after{0};
};

// Owns the target's whole life, from one thread: only one start can be under
// way, no lock guards the process, and the thread that PR_SET_PDEATHSIG follows
// lives as long as we do.
//   cold -> starting -> up -> stopping -> cold
// An `up` target under suspicion (see suspect()) is `starting` until it is
// known whether it still accepts connections.
class Supervisor {
public:
  // RAII permit to use the target; the idle timer does not run while any lease
  // exists. One that waits for the target is not granted yet.
  struct Lease {
    Lease() = default;
    Lease(const Lease &) = delete;
    Lease &operator=(const Lease &) = delete;
    ~Lease() {
      if (!supervisor) { return; }
      const Lock lock(supervisor->mutex_);
      if (--supervisor->status_.in_flight == 0) {
        supervisor->last_use_ = RunningClock::now();
      }
    }

    bool is_granted() const { return supervisor != nullptr; }
    // How long the request has waited, or the start has taken if it began
    // earlier.
    seconds waited() const {
      return std::chrono::duration_cast<seconds>(SteadyClock::now() -
                                                 std::min(since, start_began));
    }

    // Set by the supervisor:
    Supervisor *supervisor = nullptr; // once it is granted
    std::uint64_t generation = 0;     // of the target
    Endpoint endpoint;
    // A header line if the request had to wait for a start, else "".
    std::string server_timing;
    // max(): it does not wait.
    SteadyClock::time_point since = SteadyClock::time_point::max();
    SteadyClock::time_point start_began = since;
    std::uint64_t failures = 0; // the supervisor's, when the wait began
  };

  // `notify` is called from any thread when pending requests should ask again,
  // and `close_idle` from the supervisor's before the target is asked to stop,
  // and when it refuses connections. Throws std::system_error.
  Supervisor(const Config &config, const Log &log, std::function<void()> notify,
             std::function<void()> close_idle)
      : config_(config), log_(log), process_(config, log),
        notify_(std::move(notify)), close_idle_(std::move(close_idle)) {
    const SignalBlock block;
    thread_ = std::thread([this] { run(); });
  }
  ~Supervisor() {
    stop(SteadyClock::now() + clamped(config_.stop_timeout));
    join();
  }

  // Asks for the target, and starts it if necessary. Grants the lease or
  // returns a failure; with neither, call it again after `notify`. `host` is
  // the request's Host, for the readiness probe.
  std::optional<Failure> acquire(Lease &lease, std::string_view host) {
    const Lock lock(mutex_);
    if (state_ == State::up && !stopping_) {
      grant(lease);
      return {};
    }
    if (lease.since == SteadyClock::time_point::max()) {
      lease.since = SteadyClock::now();
      lease.failures = failures_;
      hosts_[1] = host;
    }
    if (draining_) { return Failure{503, "shutting down", {}}; }
    if (failures_ != lease.failures) { return failure_; }
    if (state_ == State::starting) {
      // While an up target is checked, began_ is that of an earlier start.
      if (began_ > up_since_) { lease.start_began = began_; }
      return {};
    }
    const auto pause = start_at_ - RunningClock::now();
    if (!wanted_ && pause.count() > 0) {
      return Failure{503, concat(failure_.reason, "; try again in a moment"),
                     std::chrono::ceil<milliseconds>(pause)};
    }
    if (!std::exchange(wanted_, true)) { hosts_[0] = host; }
    wakeup_.wake();
    return {};
  }

  // To be called for each request that is sent to the target.
  void count_request() { ++requests_; }

  // To be called before a retry, when a new connection was refused or closed
  // without a response: checks whether the target is still there.
  void suspect(const Lease &lease) {
    const Lock lock(mutex_);
    if (state_ != State::up || lease.generation != status_.starts) { return; }
    state_ = State::starting;
    wakeup_.wake();
  }

  // Whether the target that the lease was for has ended.
  bool has_ended(const Lease &lease) const {
    const Lock lock(mutex_);
    return state_ == State::cold || lease.generation != status_.starts;
  }

  // Starts the target without a request.
  void prewarm() {
    const Lock lock(mutex_);
    wanted_ = true;
    wakeup_.wake();
  }

  // No further starts: requests that wait fail with 503 at once.
  void drain() {
    const Lock lock(mutex_);
    draining_ = true;
    notify_();
    wakeup_.wake();
  }

  // Stops it for good, and does not wait; join() does.
  void stop(SteadyClock::time_point deadline) {
    if (stopping_) { return; }
    stop_deadline_ = deadline;
    stopping_ = true;
    drain();
  }

  void join() {
    if (thread_.joinable()) { thread_.join(); }
  }

  Status status() const {
    static constexpr const char *names[] = {"cold", "starting", "up",
                                            "stopping"};
    const Lock lock(mutex_);
    auto status = status_;
    status.requests = requests_;
    status.state = names[static_cast<int>(state_.load())];
    status.pid = process_.pid();
    status.port = endpoint_.port;
    if (state_ == State::up) {
      status.up_for = std::chrono::duration_cast<milliseconds>(
          SteadyClock::now() - up_since_);
    }
    return status;
  }

  bool owns(pid_t pid) const { return process_.owns(pid); }

private:
  enum class State { cold, starting, up, stopping };
  using Lock = std::lock_guard<std::mutex>;

  // With any_port: how long the program's port has to be its only one before it
  // is used. After this, a program that listens elsewhere is named in the log.
  static constexpr seconds settling_time{1};
  // For the answer to an attempt that was made just before the deadline.
  static constexpr seconds last_grace{1};

  void grant(Lease &lease) {
    ++status_.in_flight;
    lease.supervisor = this;
    lease.generation = status_.starts;
    lease.endpoint = endpoint_;
    if (lease.since <= up_since_) { // it waited for the start, not a reload
      lease.server_timing = concat(
          "Server-Timing: warmproxy;desc=\"cold start\";dur=",
          in_milliseconds(SteadyClock::now() - lease.since),
          ", warmproxy-spawn;dur=", in_milliseconds(spawned_ - began_),
          ", warmproxy-ready;dur=", in_milliseconds(up_since_ - spawned_),
          "\r\n");
    }
  }

  void set_state(State state) {
    const Lock lock(mutex_);
    state_ = state;
    notify_();
  }

  // Fails the requests that wait now.
  void fail_waiting(int status, const std::string &reason) {
    const Lock lock(mutex_);
    failure_ = {status, reason, pause_};
    ++failures_;
    notify_();
  }

  // The pauses between failed starts: 100 ms, doubling to 5 s.
  void back_off() {
    pause_ = std::clamp(pause_ * 2, milliseconds(100), milliseconds(5000));
    const Lock lock(mutex_);
    start_at_ = later(RunningClock::now(), pause_);
  }

  // Logs a failed start or target (`line`, or else `reason`), delays the next
  // start and fails the pending requests. Returns false, for the caller to
  // return; run() then ends the process.
  bool fail(int status, const std::string &reason,
            const std::string &line = {}) {
    log_(line.empty() ? reason : line);
    back_off();
    fail_waiting(status, reason);
    return false;
  }

  // ---- Supervisor: the thread

  void run() {
    while (!stopping_) {
      if (begin_start()) {
        if (start()) { watch(); }
        end();
        continue;
      }
      // Until start_at_, at least once per max_wait: RunningClock counts a
      // longer silence as a gap.
      wait(RunningClock::now() < start_at_ ? start_at_ : Time::max());
    }
  }

  // Waits for a wake-up, the target's exit, the probe or time_left(until), and
  // lets the probe go on. Returns a time for judging deadlines: all that had
  // arrived by then has been read.
  Time wait(Time until) {
    std::vector<pollfd> events = {{wakeup_.fd(), POLLIN, 0},
                                  {process_.exit_fd(), POLLIN, 0}};
    if (process_.started() && process_.exit_fd() < 0) {
      until = std::min(until, after(milliseconds(10)));
    }
    probe_.add_events(events, until);
    wait_for(events.data(), events.size(), until);
    wakeup_.drain();
    const auto now = RunningClock::now();
    probe_.advance(now);
    return now;
  }

  bool begin_start() {
    const Lock lock(mutex_);
    if (!wanted_ || draining_) { return false; }
    wanted_ = false;
    state_ = State::starting;
    ++status_.starts;
    began_ = SteadyClock::now();
    endpoint_ = {false, std::max(config_.target_port, 0)};
    host_turn_ = 0;
    return true;
  }

  bool start() {
    const auto deadline = after(config_.startup_timeout);
    if (!adopt_server() && !start_process(deadline)) { return false; }
    spawned_ = SteadyClock::now();
    if (!wait_until_ready(deadline)) { return false; }
    become_up();
    return true;
  }

  // Returns whether a server accepts connections on a fixed port already, with
  // the first probe under way on such a connection. A full backlog counts as a
  // server.
  bool adopt_server() {
    if (config_.target_port <= 0) { return false; }
    probe_ = Probe(endpoints());
    ask(RunningClock::now());
    const auto until = after(milliseconds(100));
    while (probe_.latest().state() == Probe::State::connecting &&
           RunningClock::now() < until) {
      wait(until);
    }
    if (probe_.latest().state() == Probe::State::no_connection) {
      return false;
    }
    log_(concat("port ", decimal(endpoint_.port),
                " is served already: using that server, starting nothing"));
    return true;
  }

  bool start_process(Time deadline) {
    const auto check = [&] {
      if (draining_) { fail_start("the start was cancelled"); }
      if (RunningClock::now() >= deadline) {
        fail_start("it took too long; see WARMPROXY_STARTUP_TIMEOUT");
      }
    };
    std::string reason;
    try {
      const int port = endpoint_.port ? endpoint_.port : free_port();
      if (port == 0) {
        fail_start(concat("cannot find a free port: ", error_text(errno)));
      }
      process_.start(port, check);
      const Lock lock(mutex_);
      if (!finds_port()) { endpoint_.port = port; }
    } catch (const std::filesystem::filesystem_error &error) {
      reason = concat(printable(error.path1()), ": ", error.code().message());
    } catch (const std::exception &error) { reason = error.what(); }
    if (draining_) { return false; }
    if (!reason.empty()) {
      const std::string what = "the target cannot be started: ";
      const auto colon = reason.find(": "); // clients must not learn the path
      const auto why = colon == reason.npos ? reason : reason.substr(colon + 2);
      const int status = RunningClock::now() < deadline ? 502 : 504;
      return fail(status, concat(what, why), concat(what, reason));
    }
    log_(concat("target started (pid ", decimal(process_.pid()), ")"));
    probe_ = Probe(endpoints());
    return true;
  }

  bool finds_port() const { return config_.target_port == any_port; }

  std::vector<Endpoint> endpoints() const {
    if (endpoint_.port == 0) { return {}; }
    if (finds_port()) { return {endpoint_}; }
    return {{false, endpoint_.port}, {true, endpoint_.port}};
  }

  // The Hosts take turns: servers close the connection to unknown ones, and one
  // visitor with a wrong Host must not keep the target from being found ready.
  void ask(Time now) {
    const Lock lock(mutex_);
    const auto &host = hosts_[host_turn_++ % 3];
    probe_.ask(config_.health_path, host.empty() ? "localhost" : host, now);
  }

  bool wait_until_ready(Time deadline) {
    auto report_at = after(settling_time);
    look_again_at_ = finds_port() ? Time() : Time::max();
    settles_at_ = Time();
    for (auto now = RunningClock::now();;) {
      if (draining_) { return false; }
      if (process_.exited()) {
        return fail(502, concat("the target ", process_.exit_text(),
                                " before it was up", process_.exit_hint()));
      }
      look_for_port(now, deadline);
      if (now >= probe_.ask_at(deadline)) { ask(now); }
      if (is_ready(now)) { return true; }
      if (!process_.started() &&
          probe_.latest().state() == Probe::State::no_connection) {
        return false; // gone, and not ours: requests ask for a start again
      }
      const auto give_up_at = std::max(deadline, last_chance());
      if (now >= give_up_at) { return on_startup_timeout(now); }
      if (now >= report_at) {
        const auto problem = listening_problem();
        if (!problem.empty()) { log_(problem); }
        report_at = problem.empty() ? later(now, settling_time) : Time::max();
      }
      now = wait(std::min(
          {give_up_at, probe_.ask_at(deadline), look_again_at_, report_at}));
    }
  }

  bool is_ready(Time now) const {
    return probe_.is_ready() && now >= settles_at_;
  }

  // Until when a start may go beyond its deadline: for the answer to a probe
  // that was sent just before, and for the port of a ready target to settle.
  Time last_chance() const {
    if (probe_.is_ready()) { return settles_at_; }
    return probe_.is_open() ? later(probe_.latest().began_at(), last_grace)
                            : Time();
  }

  // With any_port: finds out which port is the program's. A new one has to
  // settle. `in_use`: what opens beside the one that is used does not matter.
  void find_port(Time now, bool in_use) {
    const auto sockets = listeners_of(process_.pid());
    const auto found = only_endpoint(sockets);
    const bool is_open =
        std::any_of(sockets.begin(), sockets.end(), [this](const auto &socket) {
          return socket.port == endpoint_.port;
        });
    // If there are none at all, we may lack descriptors for looking.
    const bool unknown = state_ == State::up && sockets.empty();
    if (found.port == endpoint_.port || (in_use && (is_open || unknown))) {
      return;
    }
    settles_at_ = later(now, settling_time);
    const Lock lock(mutex_);
    state_ = State::starting;
    endpoint_ = found;
    probe_ = Probe(endpoints());
  }

  // Every 50 ms during a start, and right before each probe and before the
  // target counts as ready, since a port that the program has given up may be a
  // stranger's.
  void look_for_port(Time now, Time deadline) {
    const bool due = now >= look_again_at_ || now >= probe_.ask_at(deadline) ||
                     is_ready(now);
    if (!finds_port() || !due) { return; }
    look_again_at_ = later(now, milliseconds(50));
    find_port(now, false);
  }

  // What is wrong with where the program listens, and what to set; "" if
  // nothing is.
  std::string listening_problem() const {
    const auto sockets = listeners_of(process_.pid());
    std::set<std::string> places;
    std::set<int> ports; // that can be reached
    for (const auto &socket : sockets) {
      const auto address =
          socket.ipv6 ? concat("[", socket.address, "]") : socket.address;
      places.insert(concat(socket.reachable ? "port " : address + ":",
                           decimal(socket.port)));
      if (socket.reachable) { ports.insert(socket.port); }
    }
    const bool fine = finds_port() ? only_endpoint(sockets).port != 0
                                   : ports.count(endpoint_.port) > 0;
    if (sockets.empty() || fine) { return {}; }
    std::string text;
    for (const auto &place : places) {
      append(text, text.empty() ? sockets[0].program + " listens on " : " and ",
             place);
    }
    const auto wanted = finds_port() ? "127.0.0.1" : endpoint_.text();
    if (!finds_port()) { append(text, ", not on ", wanted); }
    if (ports.empty()) { return concat(text, ": make it listen on ", wanted); }
    return concat(text, ": set WARMPROXY_TARGET_PORT",
                  ports.size() == 1 ? concat("=", decimal(*ports.begin()))
                                    : " to the right one",
                  " or make it listen on $PORT");
  }

  // The startup timeout is over. Returns whether the target is used as it is: a
  // maintenance page is better passed on than killed, unless a health_path was
  // set.
  bool on_startup_timeout(Time now) {
    const auto time = concat(in_seconds(config_.startup_timeout), " s");
    const auto not_yet = probe_.not_yet(now);
    if (!not_yet.empty() && now >= settles_at_ && config_.health_path == "/") {
      log_(concat("target used as it is: ", not_yet, " after ", time,
                  " (see WARMPROXY_STARTUP_TIMEOUT)"));
      return true;
    }
    const auto problem = listening_problem();
    return fail(504, concat("target not ready after ", time,
                            " (last probe: ", probe_.latest().seen(),
                            "); see WARMPROXY_STARTUP_TIMEOUT",
                            problem.empty() ? "" : "; ", problem));
  }

  void become_up() {
    {
      const Lock lock(mutex_);
      endpoint_ = probe_.latest().endpoint();
      up_since_ = SteadyClock::now();
      status_.last_start =
          std::chrono::duration_cast<milliseconds>(up_since_ - began_);
      last_use_ = RunningClock::now();
    }
    if (!probe_.is_ready()) { probe_ = Probe(); } // used as it is
    set_state(State::up);
    const auto pid = process_.pid(); // 0: it was there before
    log_(concat("target up in ", in_seconds(up_since_ - began_), " s (",
                pid ? concat("pid ", decimal(pid), ", ") : "", "port ",
                decimal(endpoint_.port), ")"));
  }

  // ---- Supervisor: watching

  // Returns when the target is to be ended, or has exited. One that refuses
  // connections may be reloading, and has as long as a start may take.
  void watch() {
    auto refusing_since = Time::max();
    Time close_idle_at{};
    while (!stopping_) {
      const auto now = RunningClock::now();
      auto until = Time::max();
      if (process_.exited()) { return note_exit(); }
      const bool has_port = follow_port(now);
      if (state_ == State::up) {
        until = look_again_at_;
        if (stop_if_idle(until)) { return; }
      } else if (has_port && !refuses_connections()) {
        refusing_since = Time::max();
        set_state(State::up);
        continue;
      } else {
        if (!process_.started()) { return; }
        // It may be shutting down and waiting for its connections to close.
        if (now >= close_idle_at) {
          close_idle_();
          close_idle_at = later(now, seconds(1));
        }
        refusing_since = std::min(refusing_since, now);
        if (now >= later(refusing_since, config_.startup_timeout)) {
          if (!on_refusal_timeout()) { return; }
          refusing_since = now;
        }
        until = now + connect_pause(now - refusing_since);
      }
      wait(until);
    }
  }

  // With any_port: whether the program has its port, every second while it is
  // up. One that restarts itself may open another, and its old one may be a
  // stranger's by then.
  bool follow_port(Time now) {
    if (!finds_port()) { return true; }
    if (now >= look_again_at_) {
      const int before = endpoint_.port;
      find_port(now, now >= settles_at_);
      look_again_at_ =
          later(now, milliseconds(state_ == State::up ? 1000 : 50));
      if (endpoint_.port != before && endpoint_.port != 0) {
        log_(concat("target now listens on port ", decimal(endpoint_.port)));
        const Lock lock(mutex_);
        ++status_.starts; // what is connected to the old port is closed
      }
    }
    return endpoint_.port != 0 && now >= settles_at_;
  }

  // Anything but ECONNREFUSED, such as a full backlog or a lack of descriptors
  // on our side, does not mean that the target is gone.
  bool refuses_connections() const {
    return connect_error(dial(endpoint_), 100) == ECONNREFUSED;
  }

  // A target that refuses connections is ended, but not in the middle of a
  // response. Every lease still held belongs to one: a request that was
  // connecting has been refused, too. Returns whether it is left running.
  bool on_refusal_timeout() {
    const auto reason = concat("target has refused connections for ",
                               in_seconds(config_.startup_timeout),
                               " s; see WARMPROXY_STARTUP_TIMEOUT");
    if (status().in_flight == 0) { return fail(504, reason); }
    log_(concat(reason,
                " (left running: it still responds to another request)"));
    fail_waiting(504, reason);
    return true;
  }

  void note_exit() {
    const auto lived = SteadyClock::now() - up_since_;
    if (lived >= milliseconds(250)) {
      pause_ = milliseconds(0);
    } else if (pause_.count() == 0) {
      pause_ = milliseconds(50); // no pause yet: one early exit may be chance
    } else {
      back_off();
    }
    const bool left_others = ::kill(-process_.pid(), 0) == 0;
    log_(concat("target ", process_.exit_text(), " after ", in_seconds(lived),
                " s", left_others ? process_.exit_hint() : "",
                "; the next request starts it again"));
    const Lock lock(mutex_);
    failure_.reason = concat("the target ", process_.exit_text());
  }

  // Whether the target has been idle for `idle_stop` and is stopping now; else
  // `until` is when to look again, if that is earlier.
  bool stop_if_idle(Time &until) {
    if (!config_.idle_stop.count() || !process_.started()) { return false; }
    {
      const Lock lock(mutex_);
      const auto now = RunningClock::now();
      if (status_.in_flight) { last_use_ = now; }
      const auto idle_at = later(last_use_, config_.idle_stop);
      until = std::min(until, idle_at);
      if (now < idle_at) { return false; }
      pause_ = milliseconds(0);
      state_ = State::stopping;
    }
    log_(concat("target stopped: idle for ", in_seconds(config_.idle_stop),
                " s (WARMPROXY_IDLE_STOP)"));
    return true;
  }

  // Ends the target, or what it has left of its process group.
  void end() {
    set_state(State::stopping);
    probe_ = Probe();
    if (process_.started()) {
      auto deadline = SteadyClock::now() + clamped(config_.stop_timeout);
      if (process_.exited()) {
        // What it has left only holds the port that the next one needs.
        deadline = std::min(deadline, SteadyClock::now() + seconds(1));
      } else {
        close_idle_();
      }
      process_.stop(std::min(deadline, stop_deadline_.load()));
      const Lock lock(mutex_);
      status_.last_exit = process_.exit_text();
    }
    set_state(State::cold);
  }

  const Config &config_;
  const Log &log_;
  Wakeup wakeup_;
  Process process_;
  const std::function<void()> notify_, close_idle_;

  // The thread's own.
  Probe probe_;
  unsigned host_turn_ = 0;
  milliseconds pause_{0}; // between starts
  // With any_port: when to look for the port again, and until when another one
  // may still appear beside it.
  Time look_again_at_{}, settles_at_{};

  // Guards what follows. The thread reads without it what only it writes, and
  // anyone the atomic ones. Nobody else reads spawned_ before become_up().
  mutable std::mutex mutex_;
  std::atomic<State> state_{State::cold};
  std::atomic<bool> draining_{false}, stopping_{false};
  std::atomic<SteadyClock::time_point> stop_deadline_{
      SteadyClock::time_point::max()};
  bool wanted_ = false;
  // The Hosts that probes take in turns: [0] of the request that triggered the
  // start, [1] of the latest one that had to wait, [2] empty, for localhost.
  std::string hosts_[3];
  Endpoint endpoint_{false, std::max(config_.target_port, 0)};
  Status status_; // without what status() and Shared::status() fill in
  std::atomic<std::uint64_t> requests_{0};
  Time last_use_{};
  SteadyClock::time_point began_{}, spawned_{}, up_since_{};
  std::uint64_t failures_ = 0; // calls of fail_waiting()
  // The reason of the latest one, or that an up target has exited since.
  Failure failure_;
  Time start_at_{}; // a request does not start the target before this

  std::thread thread_;
};

using Lease = Supervisor::Lease;

// ---- Platform: Vercel's IPC -------------------------------------------------

// A variable of the environment; "" if it is not set.
inline std::string environment_variable(const char *name) {
  const char *value = std::getenv(name);
  return value ? value : "";
}

// What a function of Vercel's runtime `executable` has to tell the platform:
// JSON messages, each ended by a NUL, over a Unix socket. Reference:
// internals/ipc-proxy in vercel/vercel. All functions may be called from any
// thread; none of them waits for the platform.
class Vercel {
public:
  // Null without VERCEL_IPC_PATH, and if it cannot be connected, which is
  // logged. Throws std::system_error.
  static std::unique_ptr<Vercel> connect(const Log &log) {
    const auto path = environment_variable("VERCEL_IPC_PATH");
    if (path.empty()) { return {}; }
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const auto room = sizeof(address.sun_path) - 1;
    path.copy(address.sun_path, room);
    auto socket = new_socket(AF_UNIX, SOCK_NONBLOCK); // its backlog may be full
    errno = ENAMETOOLONG;
    if (path.size() <= room &&
        ::connect(socket.get(), reinterpret_cast<sockaddr *>(&address),
                  sizeof(address)) == 0) {
      return std::make_unique<Vercel>(std::move(socket));
    }
    log(printable(concat("cannot connect to Vercel: VERCEL_IPC_PATH \"", path,
                         "\": ", error_text(errno), "; going on without it")));
    return {};
  }

  explicit Vercel(Descriptor socket)
      : socket_(std::move(socket)), writer_([this] { write(); }) {}
  // Sends what is left, for at most 2 s.
  ~Vercel() {
    flush(after(seconds(2)));
    writer_.join();
  }

  void started(int port) {
    const auto took = std::chrono::duration_cast<milliseconds>(
        SteadyClock::now() - connected_);
    send("server-started", concat("\"initDuration\":", decimal(took.count()),
                                  ",\"httpPort\":", decimal(port)));
  }

  // Ends an invocation after `delay`.
  void end(std::string_view invocation_id, std::string_view request_id,
           milliseconds delay) {
    std::uint64_t number = 0; // stays 0 if there is none
    to_number(request_id, number);
    send("end",
         concat("\"context\":{\"invocationId\":", json_string(invocation_id),
                ",\"requestId\":", decimal(number), "}"),
         delay);
  }

  void unrecoverable(int exit_code, std::string_view message) {
    send("unrecoverable-error", concat("\"exitCode\":", decimal(exit_code),
                                       ",\"message\":", json_string(message)));
  }

  // Sends at once what was to be sent later, now and from now on. With
  // `give_up`, the writer ends when all is sent, or at that time.
  void flush(Time give_up = Time::max()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    flushing_ = true;
    give_up_ = give_up;
    wakeup_.wake();
  }

private:
  void send(std::string_view type, std::string_view payload,
            milliseconds delay = milliseconds(0)) {
    auto message =
        concat("{\"type\":\"", type, "\",\"payload\":{", payload, "}}");
    message += '\0';
    const std::lock_guard<std::mutex> lock(mutex_);
    later_.emplace(after(delay), std::move(message));
    send_due();
    if (delay.count() > 0 || !unsent_.empty()) { wakeup_.wake(); }
  }

  void send_due() {
    const auto due =
        later_.upper_bound(flushing_ ? Time::max() : RunningClock::now());
    for (auto next = later_.begin(); next != due; next = later_.erase(next)) {
      unsent_ += next->second;
    }
    while (!unsent_.empty()) {
      const auto n = ::send(socket_.get(), unsent_.data(), unsent_.size(),
                            MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && would_block(errno)) { return; }
      // The platform has closed the socket: discard the backlog.
      unsent_.erase(0, n > 0 ? static_cast<std::size_t>(n) : unsent_.npos);
    }
  }

  void write() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (RunningClock::now() < give_up_) {
      send_due();
      if (give_up_ < Time::max() && unsent_.empty()) { return; }
      pollfd fds[] = {{wakeup_.fd(), POLLIN, 0},
                      {unsent_.empty() ? -1 : socket_.get(), POLLOUT, 0}};
      const auto next = later_.empty() ? give_up_ : later_.begin()->first;
      lock.unlock();
      wait_for(fds, 2, next);
      wakeup_.drain();
      lock.lock();
    }
  }

  const Descriptor socket_;
  const SteadyClock::time_point connected_ = SteadyClock::now();
  Wakeup wakeup_;      // of the writer
  std::mutex mutex_;   // of all below
  std::string unsent_; // what the platform has not read yet
  // By due time, in RunningClock's: background work makes no progress while the
  // instance is frozen.
  std::multimap<Time, std::string> later_;
  bool flushing_ = false;
  Time give_up_ = Time::max();
  std::thread writer_; // the last member: it uses the others
};

// Settings that the platform calls for.
inline void adapt_to_vercel(Options &options) {
  const auto strip = environment_variable("VERCEL_SERVICE_ROUTE_PREFIX_STRIP");
  if (options.strip_prefix.empty() && list_contains("1,true", trim(strip))) {
    options.strip_prefix =
        trim(environment_variable("VERCEL_SERVICE_ROUTE_PREFIX"));
  }
  // An instance exists because a request is on its way.
  if (environment_variable("WARMPROXY_PREWARM").empty()) {
    options.prewarm = true;
  }
  if (options.host == "0.0.0.0") { options.host = "127.0.0.1"; }
  // The platform may use a connection after a freeze of any length.
  options.keep_alive_timeout = milliseconds(0);
  // The platform kills us 500 ms after SIGTERM: drain and stop within that.
  options.stop_timeout = std::min(options.stop_timeout, milliseconds(200));
  for (const auto name : {"HOME", "TMPDIR"}) { // nothing else is writable
    if (environment_variable(name).empty()) {
      options.env.emplace(name, "/tmp");
    }
  }
}

// ---- Responses of our own --------------------------------------------------

struct Reply {
  int status = 200;
  std::string lines{}; // further header lines, each with CRLF
  std::string type{};  // Content-Type; empty: none
  std::string body{};
};

// ---- Responses: pages

// The page that is shown while the target starts, or when it cannot be used. It
// loads nothing from outside. What begins with '%' is a placeholder.
inline constexpr std::string_view page_head = R"html(<!doctype html>
<html lang="%lang">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { display: grid; place-items: center; min-height: 100vh; box-sizing: border-box; margin: 0; padding: 24px;
  background: Canvas; color: CanvasText; font: 1.0625rem/1.55 system-ui, "PingFang SC", "Noto Sans CJK SC", sans-serif }
main { width: 100%; max-width: 26rem }
h1 { margin: 0 0 .35em; font-size: 1.45rem; line-height: 1.25 }
p { margin: 0 0 1.5rem; overflow-wrap: anywhere }
p::first-letter { text-transform: uppercase }
small { font-size: .9rem; font-variant-numeric: tabular-nums }
#bar { height: 3px; margin-bottom: .9rem; border: 1px solid #c2410c; border-radius: 3px;
  background: linear-gradient(#c2410c, #c2410c) 0 0 / 35% 100% no-repeat }
@keyframes go { to { background-position: 100% 0 } }
@media (prefers-reduced-motion: no-preference) { #bar { animation: go 1.6s ease-in-out infinite alternate } }
#again { padding: .6em 1.3em; font: inherit }
#again:focus-visible { outline: 3px solid; outline-offset: 2px }
</style>
)html";

// One request is kept open until the target is up: an instance that a platform
// freezes between requests would not go on starting. Any error of ours but 503
// ends the wait; window.stop() cancels a reload that Refresh may have begun.
inline constexpr std::string_view waiting_part =
    R"html(<title>%starting</title>
<noscript><meta http-equiv="refresh" content="2; url=%url"></noscript>
<main>
<div role="status" aria-live="polite"><h1 id="title">%starting</h1><p id="text">%asleep</p></div>
<div id="wait"><div id="bar" role="progressbar" aria-labelledby="title"></div><small aria-hidden="true">%waiting</small></div>
<button id="again" onclick="begin = Date.now(); show(true, '%starting', '%asleep'); ask()" hidden>%again</button>
<script>
const by = (id) => document.getElementById(id);
let begin = Date.now() - 1000 * by("time").textContent;
function show(waiting, title, text) {
  by("wait").hidden = !waiting; by("again").hidden = waiting;
  by("title").textContent = document.title = title; by("text").textContent = text;
}
async function ask() {
  try {
    const response = await fetch(location.href, { headers: { "Warmproxy-Wait": "1", Accept: "text/plain" }, cache: "no-store" });
    const text = await response.text();
    if (!text.startsWith("warmproxy: ")) {
      setTimeout(() => { show(false, "%ready", "%opened"); by("again").hidden = true; }, 3000);
      return location.reload();
    }
    if (response.status === 503) return setTimeout(ask, 1000 * response.headers.get("Retry-After"));
    window.stop(); show(false, "%failed", text.slice(11));
  } catch { setTimeout(ask, 1000); }
}
setInterval(() => { by("time").textContent = Math.round((Date.now() - begin) / 1000); }, 1000);
ask();
</script>
</main>
)html";

inline constexpr std::string_view failed_part = R"html(<title>%failed</title>
<main>
<h1>%failed</h1><p>%reason</p>
<a id="again" href="" onclick="location.reload(); return false">%again</a>
</main>
)html";

// A placeholder, its English and its Chinese text.
inline constexpr std::string_view page_texts[][3] = {
    {"%lang", "en", "zh"},
    {"%starting", "Starting up …", "正在启动……"},
    {"%asleep",
     "This site was asleep. It will open here by itself in a moment.",
     "网站刚才处于休眠状态，启动完成后会自动打开。"},
    {"%waiting", "Waiting for <span id=\"time\">%seconds</span> s",
     "已等待 <span id=\"time\">%seconds</span> 秒"},
    {"%ready", "The site has started", "网站已启动"},
    {"%opened",
     "The page will open in a moment. If it is a file, its download has begun.",
     "页面即将打开；如果是文件，则已开始下载。"},
    {"%failed", "This page could not be loaded", "页面加载失败"},
    {"%again", "Try again", "重试"}};

// A page in the visitor's language.
inline std::string page_with(std::string_view part,
                             const RequestHead &request) {
  const bool is_chinese =
      starts_with_ignore_case(request.value("Accept-Language"), "zh");
  auto page = concat(page_head, part);
  for (const auto &[key, english, chinese] : page_texts) {
    replace_all(page, key, is_chinese ? chinese : english);
  }
  return page;
}

// Fills in untrusted text: last, since it may contain a placeholder.
inline void fill(std::string &page, std::string_view key, std::string value) {
  replace_all(value, "&", "&amp;");
  replace_all(value, "<", "&lt;");
  replace_all(value, ">", "&gt;");
  replace_all(value, "\"", "&quot;");
  replace_all(page, key, value);
}

inline Reply waiting_page(const RequestHead &request, seconds waited) {
  auto page = page_with(waiting_part, request);
  replace_all(page, "%seconds", decimal(waited.count()));
  // A reference from the address to itself. Not empty: with a fragment in the
  // address, a browser would take that for a jump within the page. Relative,
  // since a path may begin with "//".
  fill(page, "%url",
       concat("./",
              request.request_target.substr(request.path().rfind('/') + 1)));
  // Where a Content-Security-Policy of a proxy forbids the script, Refresh
  // moves the page on.
  return {503, "Retry-After: 2\r\nRefresh: 15\r\n", "text/html; charset=utf-8",
          std::move(page)};
}

// Whether this is a browser's navigation.
inline bool wants_page(const RequestHead &request) {
  if (request.method != "GET") { return false; }
  const auto purpose = request.value("Sec-Fetch-Dest");
  if (!purpose.empty()) {
    return purpose == "document" || purpose == "iframe" || purpose == "frame";
  }
  // Browsers send Sec-Fetch-Dest over https alone. text/html in Accept is no
  // sign: feed readers and HTTP libraries have it, too.
  return request.value("Upgrade-Insecure-Requests") == "1" &&
         contains(request.value("Accept"), "text/html");
}

// ---- Responses: errors, status

// A page for navigations, else a line of text: "warmproxy: <reason>". 503 and
// 504 get Retry-After: `retry_after` in whole seconds, at least 1.
inline Reply error_reply(const RequestHead &request, int status,
                         std::string_view reason,
                         milliseconds retry_after = seconds(1)) {
  const auto text = concat("warmproxy: ", reason, "\n");
  Reply reply{status, {}, "text/plain; charset=utf-8", text};
  if (status == 503 || status == 504) {
    const auto wait =
        std::max(seconds(1), std::chrono::ceil<seconds>(retry_after));
    append_field(reply.lines, "Retry-After", decimal(wait.count()));
  }
  if (wants_page(request)) {
    reply.type = "text/html; charset=utf-8";
    reply.body = page_with(failed_part, request);
    fill(reply.body, "%reason", std::string(reason));
  }
  return reply;
}

// A CORS preflight request that is answered here.
inline bool is_preflight(const RequestHead &request, const Config &config) {
  return !config.cors_origins.empty() && request.method == "OPTIONS" &&
         request.find("Origin") &&
         request.find("Access-Control-Request-Method");
}

// JSON, or metrics for Prometheus where the request asks for them.
inline Reply status_reply(const RequestHead &request, const Status &status) {
  std::string json, metrics;
  const auto add_metric = [&](std::string_view name, std::string_view value,
                              std::string_view help) {
    append(metrics, "# HELP warmproxy_", name, " ", help, "\n# TYPE warmproxy_",
           name, ends_with(name, "_total") ? " counter" : " gauge",
           "\nwarmproxy_", name, " ", value, "\n");
  };
  const auto add = [&](std::string_view key, const std::string &value,
                       std::string_view metric = {},
                       std::string_view help = {}) {
    append(json, json.empty() ? "{\"" : ",\"", key, "\":", value);
    if (!metric.empty()) { add_metric(metric, value, help); }
  };
  add("state", json_string(status.state));
  add_metric("target_up", status.state == "up" ? "1" : "0",
             "Whether the target is up.");
  add("pid", decimal(status.pid));
  add("port", decimal(status.port));
  add("starts", decimal(status.starts), "target_starts_total",
      "Starts of the target.");
  add("last_exit", json_string(status.last_exit));
  add("up_seconds", in_seconds(status.up_for), "target_uptime_seconds",
      "Time since the target became ready; 0 while it is not up.");
  add("last_start_seconds", in_seconds(status.last_start),
      "target_last_start_duration_seconds",
      "Duration of the last successful start.");
  add("requests", decimal(status.requests), "requests_total",
      "Requests sent to the target.");
  add("in_flight", decimal(status.in_flight), "requests_in_flight",
      "Requests, streams and tunnels that the target serves.");
  add("connections", decimal(status.connections), "client_connections",
      "Open client connections.");
  if (contains(request.value("Accept"), "version=0.0.4") ||
      contains(concat("&", request.query(), "&"), "&format=prometheus&")) {
    return {200, {}, "text/plain; version=0.0.4; charset=utf-8", metrics};
  }
  return {200, {}, "application/json", json + "}\n"};
}

// ---- Responses: on the wire

// The reasons of the statuses that we send ourselves. A handler may choose any
// other; its reason may be empty (RFC 9112, section 4).
inline std::string status_text(int status) {
  static constexpr std::string_view known[] = {
      "200 OK",
      "204 No Content",
      "400 Bad Request",
      "408 Request Timeout",
      "431 Request Header Fields Too Large",
      "500 Internal Server Error",
      "501 Not Implemented",
      "502 Bad Gateway",
      "503 Service Unavailable",
      "504 Gateway Timeout",
      "505 HTTP Version Not Supported"};
  auto code = decimal(status) + " ";
  for (const auto text : known) {
    if (starts_with(text, code)) { return std::string(text); }
  }
  return code;
}

// RFC 9110, section 5.6.7, whatever the locale.
inline std::string http_date(std::time_t time) {
  static const auto english = ::newlocale(LC_ALL_MASK, "C", nullptr);
  std::tm utc{};
  ::gmtime_r(&time, &utc);
  char text[64];
  ::strftime_l(text, sizeof(text), "%a, %d %b %Y %H:%M:%S GMT", &utc, english);
  return text;
}

// Adds what a response of ours needs: Date and Cache-Control unless `lines` has
// them, Content-Type and Content-Length if it may have a body, CORS,
// Connection.
inline void write_reply(const Reply &reply, const RequestHead &request,
                        const Config &config, bool keep_alive,
                        std::string &out) {
  append(out, "HTTP/1.1 ", status_text(reply.status), "\r\n");
  if (!find_line(reply.lines, "Date")) {
    append_field(out, "Date", http_date(std::time(nullptr)));
  }
  const bool has_body = reply.status != 204 && reply.status != 304;
  if (has_body) {
    if (!reply.type.empty()) { append_field(out, "Content-Type", reply.type); }
    append_field(out, "Content-Length", decimal(reply.body.size()));
  }
  if (!find_line(reply.lines, "Cache-Control")) {
    append_field(out, "Cache-Control", "no-store");
  }
  out += reply.lines;
  write_cors(request, config, out);
  write_persistence(request, keep_alive, out);
  out += "\r\n";
  if (has_body && request.method != "HEAD") { out += reply.body; }
}

// ---- Client ----------------------------------------------------------------

// What others than Connection itself see of a client's connection.
struct Client : Task {
  explicit Client(BufferPool &buffers) : received(buffers) {}

  Socket socket;
  Buffer received;
  std::string address;
  int port = 0;
  // NTLM or Negotiate has logged the client in on its upstream connection, so
  // that its own connection must not outlive that one.
  bool authenticated = false;

  // A node for IdleClients' list, which has it while the client is idle, so
  // that neither move allocates.
  std::list<Client *> not_idle{this};
  const std::list<Client *>::iterator entry = not_idle.begin();
  Time idle_since{};
  bool is_evicted = false;
};

// ---- Routes: the seam to cpp-httplib ---------------------------------------

// A client's connection, lent to an own route for one request: cpp-httplib
// reads the request from it and writes its response to it. Reads end where the
// request does, whatever the handler or the parser left of it. The response's
// head gets our Connection lines.
class Loan : public httplib::Stream {
public:
  // All of them outlive the loan, and the client's socket stays open.
  Loan(const Client &client, const RequestHead &request, const Config &config,
       bool is_last)
      : received(client.received.view()),
        keep_alive(request.keep_alive && !is_last), client_(client),
        request_(request), config_(config), body_(request.framing) {
    HeadWriter(request, {config, client.address, {}}, request_head_)
        .write_own_request();
  }

  // `complete`: what process_request() has returned.
  void finish(bool complete) {
    const bool failed = !complete || broken_;
    keep_alive &= !failed && responding_ && response_.done();
    // What only the end of the connection ends must not look complete.
    must_reset =
        failed && responding_ &&
        (is_dechunked() || response_.mode() == Framing::Mode::until_close);
  }

  std::string received; // bytes after the head; in the end, after the request
  bool keep_alive;      // whether the connection is good for the next request
  bool must_reset = false; // the connection, in place of a close

  // Stream's virtual functions, which differ between versions: hence all of
  // them, and no `override`.
  bool is_readable() const { return !broken_; }
  bool is_writable() const { return is_peer_alive(); }
  bool wait_readable() const { return !broken_; }
  bool wait_writable() const { return is_peer_alive(); }
  void get_remote_ip_and_port(std::string &ip, int &port) const {
    ip = client_.address;
    port = client_.port;
  }
  void get_local_ip_and_port(std::string &ip, int &port) const {
    const auto local = local_address(client_.socket.fd);
    ip = local.text();
    port = local.port();
  }
  // cpp-httplib up to 0.18 refuses descriptors that select(2) cannot take, and
  // only looks at this one.
  socket_t socket() const { return fd() < FD_SETSIZE ? fd() : STDIN_FILENO; }
  time_t duration() const { return 0; }
  void set_read_timeout(time_t, time_t = 0) {}

  // A content provider that waits for events asks this (DataSink::is_writable).
  // Without a write, nothing else ends it when the client has left or the loan
  // is aborted. Bytes that are left to be read hide the end from recv(), but
  // not from poll().
  bool is_peer_alive() const {
    short half_closed = 0;
#ifdef POLLRDHUP
    half_closed = POLLRDHUP;
#endif
    pollfd peer{fd(), half_closed, 0};
    ::poll(&peer, 1, 0);
    if (broken_ || (peer.revents & ~half_closed)) { return false; }
    char byte;
    if (!peer.revents && ::recv(fd(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) != 0) {
      return true;
    }
    if (gone_at_ == Time::max()) {
      gone_at_ = after(milliseconds(WARMPROXY_HALF_CLOSE_GRACE));
    }
    return RunningClock::now() < gone_at_;
  }

  ssize_t read(char *data, std::size_t size) {
    if (head_read_ < request_head_.size()) {
      const auto n = request_head_.copy(data, size, head_read_);
      head_read_ += n;
      return static_cast<ssize_t>(n);
    }
    if (body_.done()) { return 0; }
    if (received.empty()) { receive(); }
    const auto n = body_.take(std::string_view(received).substr(0, size));
    received.copy(data, n);
    received.erase(0, n);
    return n ? static_cast<ssize_t>(n) : -1;
  }

  ssize_t write(const char *data, std::size_t size) {
    const std::string_view bytes(data, size);
    if (responding_) {
      send_body(bytes);
    } else {
      head_ += bytes;
      while (const auto end = responding_ || broken_ ? 0 : head_end(head_)) {
        send_head(std::string_view(head_).substr(0, end));
        head_.erase(0, end);
      }
      if (responding_) { send_body(std::exchange(head_, {})); }
    }
    return broken_ ? -1 : static_cast<ssize_t>(size);
  }

private:
  int fd() const { return client_.socket.fd.get(); }

  // After a call that failed: waits until the socket is ready for another.
  // False for any error but EAGAIN and EINTR, and after WARMPROXY_SEND_TIMEOUT
  // without progress. cpp-httplib's own time limits do not cover our streams.
  bool wait(short events) {
    if (!would_block(errno)) { return false; }
    pollfd socket{fd(), events, 0};
    const auto deadline = after(milliseconds(WARMPROXY_SEND_TIMEOUT));
    while (!wait_for(&socket, 1, deadline) && RunningClock::now() < deadline) {}
    return socket.revents != 0;
  }

  void receive() {
    char bytes[16384];
    ssize_t n = 0;
    do {
      n = ::recv(fd(), bytes, sizeof(bytes), MSG_DONTWAIT);
    } while (n < 0 && wait(POLLIN));
    broken_ |= n <= 0;
    received.assign(bytes, static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
  }

  void send_all(std::string_view bytes) {
    while (!bytes.empty() && !broken_) {
      const auto n =
          ::send(fd(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n > 0) { bytes.remove_prefix(static_cast<std::size_t>(n)); }
      broken_ = n <= 0 && !wait(POLLOUT);
    }
  }

  // cpp-httplib announces its own keep-alive limits, which are not ours.
  void send_head(std::string_view text) {
    ResponseHead response;
    if (parse_response(text, request_.method, response)) {
      broken_ = true;
      return;
    }
    responding_ = response.status >= 200;
    response_ = response.framing;
    // RFC 9110, section 15.2
    if (!responding_ && request_.minor == 0) { return; }
    std::string out = concat("HTTP/1.1 ", response.status_and_reason, "\r\n");
    for (const auto &field : response.fields) {
      // RFC 9112, section 6.1
      const bool left_out =
          field.is("Transfer-Encoding") && request_.minor == 0;
      if (!left_out && !response.is_hop_by_hop(field)) {
        append(out, field.line, "\r\n");
      }
    }
    if (responding_) {
      keep_alive &= body_.done() && !is_dechunked() &&
                    response_.mode() != Framing::Mode::until_close;
      write_persistence(request_, keep_alive, out);
      const auto limit = config_.keep_alive_timeout;
      if (keep_alive && limit >= seconds(1) &&
          limit <= std::chrono::hours(24)) {
        append_field(out, "Keep-Alive",
                     concat("timeout=", decimal(limit.count() / 1000)));
      }
    }
    send_all(out += "\r\n");
  }

  // An HTTP/1.0 client gets the content of chunks alone. What goes beyond the
  // response, such as the body of a 204, is left out.
  void send_body(std::string_view body) {
    std::string content;
    const bool dechunk = is_dechunked();
    const auto n = response_.take(body, dechunk ? &content : nullptr);
    broken_ |= response_.malformed();
    send_all(dechunk ? content : body.substr(0, n));
  }
  bool is_dechunked() const {
    return request_.minor == 0 && response_.mode() == Framing::Mode::chunked;
  }

  const Client &client_;
  const RequestHead &request_;
  const Config &config_;
  std::string request_head_;  // as own routes see it
  std::size_t head_read_ = 0; // bytes of request_head_
  Framing body_;              // of the request
  std::string head_;          // of the response, while it is not complete
  Framing response_;
  bool responding_ = false; // the final head has been sent
  bool broken_ = false;
  mutable Time gone_at_ = Time::max(); // after the grace for a half-close
};

// The server of one prefix, which serves single requests on lent connections.
class RouteServer : public httplib::Server {
public:
  ~RouteServer() override { close(); }

  // Its thread pool exists between these two.
  void open() {
    // Content providers end at once when this is INVALID_SOCKET. It is only
    // compared, and not a real descriptor, since stop() would close that.
    svr_sock_ = INVALID_SOCKET - 1;
    pool_.reset(new_task_queue());
  }
  void close() {
    abort();
    if (pool_) { pool_->shutdown(); }
    pool_.reset();
  }
  // Ends the streams of content providers.
  void abort() { svr_sock_ = INVALID_SOCKET; }

  // Serves the loan on a thread of the pool, which calls `returned` at the end.
  // False if the pool refuses it. To end it early, shut its descriptor down.
  bool lend(Loan &loan, std::function<void()> returned) {
    return enqueue(*pool_, [this, &loan, returned = std::move(returned)] {
      serve(loan);
      returned(); // there may be no loan any more
    });
  }

private:
  template <typename Queue, typename Job>
  static bool enqueue(Queue &queue, const Job &job) {
    if constexpr (std::is_void_v<decltype(queue.enqueue(job))>) {
      queue.enqueue(job); // before 0.15.0 it takes every job
      return true;
    } else {
      return queue.enqueue(job);
    }
  }

  using Setup = std::function<void(httplib::Request &)>;
  using Server::process_request;
  // Before 0.18.0 it takes no addresses. From then on its own overload comes
  // before this template.
  template <typename S>
  bool process_request(S &stream, const std::string &, int, const std::string &,
                       int, bool close, bool &closed, const Setup &setup) {
    return process_request(stream, close, closed, setup);
  }

  void serve(Loan &loan) {
    httplib::Stream &stream = loan;
    bool closed = false, complete = false;
    try {
      std::string remote, local;
      int remote_port = 0, local_port = 0;
      loan.get_remote_ip_and_port(remote, remote_port);
      loan.get_local_ip_and_port(local, local_port);
      complete = process_request(stream, remote, remote_port, local, local_port,
                                 true, closed, Setup());
    } catch (...) {} // of a handler, where cpp-httplib does not catch it
    loan.finish(complete);
  }

  std::unique_ptr<httplib::TaskQueue> pool_;
};

// ---- Routes: the pre-routing handler

inline std::string percent_decode(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char *digits = text.data() + i + 1;
    unsigned char byte = 0;
    if (text[i] == '%' && i + 2 < text.size() &&
        std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2) {
      out += static_cast<char>(byte);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

// The request as the handler sees it. process_request() is of no use here: it
// answers methods and header values that it does not know by itself.
inline httplib::Request routing_request(const RequestHead &head,
                                        const Client &client,
                                        const Config &config) {
  const auto local = local_address(client.socket.fd);
  httplib::Request request;
  request.remote_addr = client.address;
  request.remote_port = client.port;
  request.local_addr = local.text();
  request.local_port = local.port();
  request.method = head.method;
  request.target = head.request_target;
  request.path = percent_decode(head.path());
  request.version = head.minor ? "HTTP/1.1" : "HTTP/1.0";
  httplib::detail::parse_query_text(std::string(head.query()), request.params);
  std::string unused;
  HeadWriter(head, {config, client.address, {}}, unused)
      .for_each_own_field([&](std::string_view name, std::string_view value) {
        request.headers.emplace(name, value);
      });
  return request;
}

// Whether it names a file as its body, as it can from 0.18.0 on.
template <typename Response>
auto has_file(const Response &response, int)
    -> decltype(!response.file_content_path_.empty()) {
  return !response.file_content_path_.empty();
}
template <typename Response> bool has_file(const Response &, long) {
  return false;
}

// The reply of a handler that has handled the request, or nothing.
inline std::optional<Reply>
call_pre_routing_handler(const httplib::Server::HandlerWithResponse &handler,
                         const RequestHead &head, const Client &client,
                         const Config &config, const Log &log) {
  if (!handler) { return {}; }
  const auto failed = [&log](const char *why) {
    log(concat("pre-routing handler failed: ", why));
    return Reply{500};
  };
  using Result = httplib::Server::HandlerResponse;
  const auto request = routing_request(head, client, config);
  httplib::Response response;
  try {
    if (handler(request, response) != Result::Handled) { return {}; }
    if (response.content_provider_ || has_file(response, 0)) {
      return failed("content providers and files are not supported");
    }
  } catch (const std::exception &error) {
    return failed(error.what());
  } catch (...) { return failed("unknown exception"); }
  Reply reply{response.status > 0 ? response.status : 200};
  reply.body = std::move(response.body);
  for (const auto &[name, value] : response.headers) {
    const bool is_ours =
        !config.cors_origins.empty() && is_cors_permission(name);
    if (!is_ours && !is_one_of(name, "Content-Length", "Transfer-Encoding",
                               "Connection", "Keep-Alive")) {
      append(reply.lines, name, ": ", value, "\r\n");
    }
  }
  return reply;
}

// ---- Worker: what connections share -----------------------------------------

// The client connections of one event loop without a request under way, new and
// lingering ones included. At `max_connections`, the one that has been idle for
// longest makes room.
class IdleClients : public Task {
public:
  explicit IdleClients(Loop &loop) : loop_(loop) {}

  void enter(Client &client) {
    if (client.not_idle.empty() || client.is_evicted) { return; }
    client.idle_since = loop_.now();
    idle_.splice(idle_.end(), client.not_idle);
    publish();
    evict();
  }
  void leave(Client &client) {
    if (!client.not_idle.empty()) { return; }
    client.not_idle.splice(client.not_idle.end(), idle_, client.entry);
    publish();
  }

  // From any thread: when the client that is idle for longest became idle;
  // max() if none is, or all are being evicted.
  Time oldest_idle_since() const {
    return evictions_due_ < count_ ? oldest_idle_since_.load() : Time::max();
  }
  void evict_oldest() {
    ++evictions_due_;
    loop_.resume(*this);
  }

  void resumed() override { evict(); }
  Next run() override { return Next::wait; }
  Time deadline() const override { return Time::max(); }

private:
  // If fewer are idle than are due, the next ones to become idle are evicted.
  void evict() {
    for (; evictions_due_ > 0 && !idle_.empty(); --evictions_due_) {
      auto &client = *idle_.front();
      leave(client);
      client.is_evicted = true;
      loop_.schedule(client, loop_.now());
    }
  }

  void publish() {
    count_ = idle_.size();
    oldest_idle_since_ =
        idle_.empty() ? Time::max() : idle_.front()->idle_since;
  }

  Loop &loop_;
  std::list<Client *> idle_; // the longest idle one first
  std::atomic<std::size_t> count_{0}, evictions_due_{0};
  std::atomic<Time> oldest_idle_since_{Time::max()};
};

struct Shared;

// One event loop with what its connections share.
struct Worker {
  Worker(Shared &s, const Log &log) : shared(s), loop(log) {}

  Time after(milliseconds time) const { return later(loop.now(), time); }

  Shared &shared;
  Loop loop;
  UpstreamPool pool{loop};
  IdleClients idle_clients{loop};
  ResponseHead response; // the one being read: its memory serves the next one
};

// What all connections of a server share.
struct Shared {
  // Throws std::system_error.
  Shared(const Options &options, Vercel *v)
      : config{options, v != nullptr, normalized_prefix(options.strip_prefix)},
        log(config), vercel(v), workers(make_workers()),
        supervisor(
            config, log, [this] { notify_all(); },
            [this] { close_idle_upstreams_and_wait(); }) {}

  Status status() const {
    auto status = supervisor.status();
    status.connections = connections();
    return status;
  }
  std::size_t connections() const {
    std::size_t count = 0;
    for (const auto &worker : workers) {
      count += worker->loop.size();
    }
    return count;
  }
  void notify_all() {
    for (const auto &worker : workers) {
      worker->loop.notify();
    }
  }
  // Any loop may hold the idle connection that a target waits for, or that has
  // the descriptor we lack.
  void close_idle_upstreams() {
    for (const auto &worker : workers) {
      worker->pool.request_close_idle();
    }
  }
  // Whether to close a connection instead of making it idle, since a request
  // has stalled. Each stall closes one.
  bool take_stall() {
    auto count = stalls.load();
    while (count > 0 && !stalls.compare_exchange_weak(count, count - 1)) {}
    return count > 0;
  }
  // The server of own routes for this path, or null.
  RouteServer *find_route(std::string_view path) {
    for (auto &[prefix, server] : routes) {
      if (is_below(path, prefix)) { return &server; }
    }
    return nullptr;
  }

  const Config config;
  const Log log;
  Vercel *const vercel; // null elsewhere
  // By prefix; of those that a path is below, the longest comes first.
  std::map<std::string, RouteServer, std::greater<>> routes;
  httplib::Server::HandlerWithResponse pre_routing_handler;
  std::atomic<bool> draining{false}, aborting{false};
  // Connections that nobody has to wait for when we drain: tunnels and event
  // streams, which the target ends, and those that merely linger.
  std::atomic<std::size_t> endless{0}, lingering{0};
  std::atomic<std::size_t> stalls{0}; // for which none was closed yet
  const std::vector<std::unique_ptr<Worker>> workers;
  Supervisor supervisor; // the last member: its thread uses the others

private:
  std::vector<std::unique_ptr<Worker>> make_workers() {
    const auto cpus = std::thread::hardware_concurrency();
    std::vector<std::unique_ptr<Worker>> made(
        std::clamp<unsigned>(cpus, 1, WARMPROXY_MAX_LOOPS));
    for (auto &worker : made) {
      worker = std::make_unique<Worker>(*this, log);
      // Wakes drain(). It runs after size() has dropped, which is seen then.
      worker->loop.on_close = [this] {
        if (draining) { workers.front()->loop.wake(); }
      };
    }
    return made;
  }

  // For a target that is to end, and may wait for the end of its connections
  // first. Waits up to 100 ms. Loops that do not run hold none.
  void close_idle_upstreams_and_wait() {
    close_idle_upstreams();
    const auto deadline = SteadyClock::now() + milliseconds(100);
    for (const auto &worker : workers) {
      while (worker->pool.idle_count() > 0 && SteadyClock::now() < deadline) {
        ::poll(nullptr, 0, 1);
      }
    }
  }
};

// ---- Exchange: one request with the target ----------------------------------

// One direction of an exchange: `head` goes out first, then the bytes of
// `source` that belong to the message. With `dechunk`, `head` has the content,
// too, and of a response of our own all.
struct Flow {
  Flow(Buffer &from, Socket *to) : source(from), sink(to) {}

  bool pending() const { return sent < head.size() || framed > 0; }
  bool can_write() const { return pending() && sink->writable && !stopped; }
  bool finished() const { return framing.done() && !pending(); }

  // Finds out how much of `source` belongs to the message.
  void frame() {
    if (dechunk) {
      source.consume(framing.take(source.view(), &head));
      return;
    }
    framed += framing.take(source.view().substr(framed));
    while (framing.at_superfluous_blank()) {
      source.erase(framed);
      framed += framing.take(source.view().substr(framed));
    }
  }

  // Sends what is pending and the sink has room for. False if the sink failed.
  bool write() {
    const auto body = source.view();
    iovec parts[] = {{head.data() + sent, head.size() - sent},
                     {const_cast<char *>(body.data()), framed}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const auto n =
        ::sendmsg(sink->fd.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
      sink->writable = errno == EINTR;
      return would_block(errno) || errno == ENOTCONN; // not connected yet
    }
    moved = true;
    const auto written = static_cast<std::size_t>(n);
    const auto of_head = std::min(written, head.size() - sent);
    sent += of_head;
    if (sent == head.size()) {
      head.clear();
      sent = 0;
    }
    source.consume(written - of_head);
    framed -= written - of_head;
    sink->writable = !pending(); // otherwise it would have taken all
    return true;
  }

  Buffer &source;
  Socket *sink;
  std::string head;
  std::size_t sent = 0;   // of head
  std::size_t framed = 0; // bytes at the front of source that may go out
  Framing framing;
  bool dechunk = false; // send the content of the chunks alone
  bool moved = false;   // something was sent
  bool stopped = false; // writing failed
  bool shut = false;    // shutdown(2) was called on the sink
};

// One attempt to take a request to the target and its response back.
class Exchange {
public:
  enum class Result {
    go_on,
    wait,  // for an event or the deadline
    done,  // the response has been passed on in full
    reply, // we have to respond ourselves: see reply()
    retry, // in another exchange
    abort  // one side is gone: close the client's connection
  };

  // `sends_left`: how often the request may still be sent.
  Exchange(Worker &worker, Client &client, const RequestHead &request,
           int &sends_left)
      : worker_(worker), shared_(worker.shared), client_(client),
        request_(request), sends_left_(sends_left),
        // Stricter than RFC 9110, section 9.2.2, which lets idempotent methods
        // be sent again: those may change something.
        repeatable_(request.is_safe() && request.framing.done()),
        received_(worker.loop.buffers), upload_(client.received, nullptr),
        download_(received_, &client.socket) {
    upload_.framing = request.framing;
    if (shared_.config.waiting_page_after.count() && wants_page(request)) {
      show_page_at_ = worker_.after(shared_.config.waiting_page_after);
    }
  }
  ~Exchange() {
    if (endless_) { --shared_.endless; }
    // A close-delimited response must not look complete: abort with RST.
    if (until_close_ && !download_.finished()) {
      reset_on_close(client_.socket.fd.get());
    }
    if (upstream_) { worker_.pool.close(std::move(upstream_)); }
  }

  // One step: gets an upstream connection if there is none, or else reads and
  // writes at most once in each direction.
  Result run() {
    moved_ = false;
    if ((upstream_ ? check_progress() : await_target()) && write_both() &&
        read_from_client() && read_from_target()) {
      return moved_ || upload_.can_write() || download_.can_write()
                 ? Result::go_on
                 : Result::wait;
    }
    if (result_ == Result::done) { release_upstream(); }
    return result_;
  }
  Time deadline() const {
    return std::min({show_page_at_, check_at_, gone_at_});
  }
  // Whether the client's connection can serve another request after `done`.
  bool keep_alive() const { return keep_alive_; }
  const Reply &reply() const { return reply_; }
  // The rest of a 1xx that must go out before our own response.
  std::string unsent() const { return download_.head.substr(download_.sent); }
  bool tunnel_established() const {
    return is_tunnel() && !download_.pending();
  }

private:
  // The functions that return bool: false if run() has to return `result_`.
  bool end(Result result) {
    result_ = result;
    return false;
  }
  bool respond(Reply reply) {
    reply_ = std::move(reply);
    return end(Result::reply);
  }
  bool fail(int status, std::string_view reason) {
    return respond(error_reply(request_, status, reason));
  }
  bool bad_response(std::string_view reason) {
    shared_.log.once("response refused: ", reason);
    return fail(502, concat("the target's response is malformed: ", reason));
  }

  Forwarding forwarding() const {
    return {shared_.config, client_.address, lease_.endpoint};
  }
  bool is_tunnel() const {
    return download_.framing.mode() == Framing::Mode::tunnel;
  }

  // ---- Getting a connection to the target

  bool await_target() {
    if (!read_from_client()) { return false; }
    if (const auto failure =
            shared_.supervisor.acquire(lease_, request_.host)) {
      return respond(error_reply(request_, failure->status, failure->reason,
                                 failure->retry_after));
    }
    if (!lease_.is_granted()) {
      return worker_.loop.now() < show_page_at_
                 ? end(Result::wait)
                 : respond(waiting_page(request_, lease_.waited()));
    }
    // The waiting page's script: it learns that the target is ready.
    if (request_.method == "GET" && request_.find("Warmproxy-Wait")) {
      return respond({204, lease_.server_timing});
    }
    shared_.supervisor.count_request();
    return open_upstream();
  }

  bool open_upstream() {
    show_page_at_ = check_at_ = Time::max();
    // What was sent on a stale connection goes out on a new one.
    if (sends_left_ == WARMPROXY_MAX_ATTEMPTS) {
      upstream_ = worker_.pool.take(client_, lease_.generation, repeatable_);
    }
    is_new_ = !upstream_;
    if (is_new_) {
      upstream_ =
          worker_.pool.open(lease_.endpoint, lease_.generation, client_);
      if (!upstream_) { return connect_failed(errno); }
      check_at_ = worker_.after(check_interval_);
      stalled_at_ = std::min(
          stalled_at_, worker_.after(milliseconds(WARMPROXY_STALL_TIMEOUT)));
    }
    upload_.sink = upstream_.get();
    HeadWriter(request_, forwarding(), upload_.head).write_request();
    return true;
  }

  bool connect_failed(int error) {
    if (error == ECONNREFUSED) { return no_response(); }
    // We lack descriptors, ports or memory. Idle connections hold some.
    shared_.close_idle_upstreams();
    const auto reason =
        concat("cannot connect to the target: ", error_text(error));
    shared_.log.once(reason);
    return fail(503, reason);
  }

  // The upstream connection was refused or ended before a response. Only a
  // request that changes nothing is sent again, and once at most after it was
  // sent on a new connection; a stale idle one is no evidence about the target.
  bool no_response() {
    if (!is_new_) { worker_.pool.note_early_end(); }
    if (upload_.moved) {
      --sends_left_;
      if (is_new_) { sends_left_ = std::min(sends_left_, 1); }
      // What has been sent to the client is a 1xx.
      if (!repeatable_ || download_.moved) { sends_left_ = 0; }
    }
    if (sends_left_ == 0) {
      return fail(502, "the target closed the connection without a response");
    }
    if (is_new_) { shared_.supervisor.suspect(lease_); }
    return end(Result::retry);
  }

  // A connect that takes long has met a full backlog, and the kernel would try
  // again after 1, 3 and 7 s. Another attempt gets in as soon as there is room,
  // as when 200 first requests arrive at once. Only the client's patience ends
  // this: a busy target is not a dead one.
  bool check_progress() {
    if (worker_.loop.now() < check_at_) { return true; }
    if (responding_) { return end(Result::done); } // see finish_upload()
    check_interval_ = std::min<milliseconds>(check_interval_ * 2, seconds(1));
    // A server of one connection at a time may be blocked on an idle one, or on
    // one that another request is about to make idle.
    if (worker_.loop.now() >= stalled_at_) {
      if (!std::exchange(has_stalled_, true)) { ++shared_.stalls; }
      shared_.close_idle_upstreams();
    }
    if (!upload_.moved && !upstream_->writable) {
      worker_.pool.close(std::move(upstream_));
      upload_.head.clear();
      return open_upstream();
    }
    check_at_ = worker_.after(check_interval_);
    return true;
  }

  // ---- Moving bytes

  bool write_both() {
    if (upload_.can_write() && !upload_.write()) {
      upload_.stopped = true; // yet the target may have responded before
      if (!upload_.moved && !responding_) { return no_response(); }
    }
    if (download_.can_write()) {
      if (!download_.write()) { return end(Result::abort); }
      // A client that is gone answers this with a reset. One that does not may
      // read slowly, without a limit, or wait for more, for 5 s.
      if (half_closed_) {
        gone_at_ =
            download_.pending() ? Time::max() : worker_.after(seconds(5));
      }
    }
    if (is_tunnel()) { return advance_tunnel(); }
    return responding_ && download_.finished() ? finish_upload() : true;
  }

  // The response is complete and the request is not. A target that keeps its
  // connection has to read the rest (RFC 9112, section 9.3), and may need it.
  // check_progress() gives up when nothing has moved for 2 s, since the client
  // has most likely stopped; for 10 s if it is up to the target, which may only
  // be slow.
  bool finish_upload() {
    const bool hurried = shared_.draining || shared_.stalls > 0;
    if (upload_.finished() || upload_.stopped || !upstream_lasts_ ||
        until_close_ || upstream_->ended || !received_.empty() ||
        (hurried && !upload_.pending())) {
      return end(Result::done);
    }
    if (std::exchange(upload_.moved, false) || check_at_ == Time::max()) {
      check_at_ = worker_.after(seconds(upload_.pending() ? 10 : 2));
    }
    return true;
  }

  // Either side of a tunnel may close while the other still sends.
  bool advance_tunnel() {
    // What a client has sent before a reset goes out first: recv(2) returns
    // that, and then the reset, but not once it has returned the end.
    if (client_.socket.broken && !download_.shut && !upload_.can_write() &&
        (upload_.pending() || half_closed_)) {
      return end(Result::abort);
    }
    if (half_closed_) { upload_.framing.close(); }
    gone_at_ = Time::max();
    for (auto *flow : {&upload_, &download_}) {
      // Only once: every shutdown() triggers an event for the socket itself.
      if (flow->finished() && !std::exchange(flow->shut, true)) {
        ::shutdown(flow->sink->fd.get(), SHUT_WR);
      }
    }
    // After a reset by the target, or its end, the client has nobody left to
    // talk to, whether it closes or not.
    const bool over = download_.shut && (upload_.shut || upload_.stopped ||
                                         shared_.supervisor.has_ended(lease_));
    return over ? end(Result::done) : true;
  }

  // Reads more of the body, the next request, or the end.
  bool read_from_client() {
    auto &socket = client_.socket;
    const bool blocked = upstream_ && upload_.pending();
    if (socket.readable && !half_closed_ && !blocked &&
        !client_.received.full()) {
      const auto n = client_.received.receive(socket);
      if (n < 0 && !would_block(errno)) { return end(Result::abort); }
      if (n == 0) {
        half_closed_ = true;
        gone_at_ = worker_.after(milliseconds(WARMPROXY_HALF_CLOSE_GRACE));
      }
      moved_ = true;
    } else if (!is_tunnel() &&
               (socket.broken || worker_.loop.now() >= gone_at_)) {
      return end(Result::abort);
    }
    upload_.frame();
    if (!upload_.framing.malformed()) { return true; }
    if (!responding_) { return fail(400, "malformed chunk in the body"); }
    return end(download_.finished() ? Result::done : Result::abort);
  }

  bool read_from_target() {
    if (!upstream_->readable || download_.pending() || download_.shut) {
      return true;
    }
    const auto n = received_.receive(*upstream_);
    if (n < 0 && would_block(errno)) { return true; }
    moved_ = true;
    if (n <= 0) { return upstream_ended(n == 0); }
    if (!responding_ && !read_response_heads()) { return false; }
    download_.frame();
    if (!download_.framing.malformed()) { return true; }
    if (!download_.moved) {
      download_.head.clear();
      until_close_ = false;
      return bad_response("malformed chunk in the body");
    }
    shared_.log.once("response aborted: malformed chunk in the body");
    return end(Result::abort);
  }

  bool upstream_ended(bool orderly) {
    if (!responding_) {
      return received_.empty() ? no_response()
                               : bad_response("it ended within its head");
    }
    if (download_.finished()) { return end(Result::done); }
    // A body that ends with the connection, or a tunnel. Any other is
    // truncated.
    if (!orderly || download_.framing.mode() < Framing::Mode::until_close) {
      return end(Result::abort);
    }
    download_.framing.close();
    return true;
  }

  // Reads the heads that have arrived: any 1xx, then the final one.
  bool read_response_heads() {
    while (!responding_) {
      const auto bytes = received_.view();
      const auto size = head_end(bytes);
      if (!size) {
        return !received_.full() || bad_response("its head is too large");
      }
      auto &response = worker_.response;
      const auto refusal =
          parse_response(bytes.substr(0, size), request_.method, response);
      received_.consume(size);
      if (refusal) { return bad_response(refusal.reason); }
      for (const auto &repair : response.repairs) {
        shared_.log.once("response repaired: ", repair);
      }
      if (response.is_switching() && !request_.upgrades()) {
        return bad_response("101 without a request for an upgrade");
      }
      // RFC 9110, section 15.5.9: it was sent to the connection while that was
      // idle, and is no response to this request.
      if (response.status == 408 && !is_new_ && repeatable_ &&
          !response.keep_alive) {
        return no_response();
      }
      upstream_lasts_ &= !response.must_close;
      if (response.status >= 200 || response.is_switching()) {
        begin_response(response);
      } else if (request_.minor == 1) { // RFC 9110, section 15.2
        HeadWriter(request_, forwarding(), download_.head)
            .write_response(response, true, {});
      }
    }
    return true;
  }

  void begin_response(const ResponseHead &response) {
    responding_ = true;
    check_at_ = Time::max();
    download_.framing = response.framing;
    if (response.is_switching()) {
      upload_.framing = download_.framing = Framing(Framing::Mode::tunnel);
      upload_.frame(); // what the client has already sent
    }
    const auto mode = download_.framing.mode();
    download_.dechunk = mode == Framing::Mode::chunked && request_.minor == 0;
    until_close_ = download_.dechunk || mode >= Framing::Mode::until_close;
    // A client that was logged in on its upstream connection must notice that
    // this connection is no more.
    const bool login_lost =
        client_.authenticated && upstream_->client != &client_;
    if (authenticates_connection(request_) ||
        authenticates_connection(response)) {
      client_.authenticated = upstream_->authenticated = true;
    }
    if (response.is_parse_error()) { upstream_->client = &client_; }
    // What the target may have left unread, or sent too much, must not become
    // part of the next exchange.
    upstream_lasts_ &= response.keep_alive &&
                       mode != Framing::Mode::until_close &&
                       !request_.upgrades() &&
                       (request_.method != "HEAD" || upstream_->authenticated);
    // A client that awaits a 100 does not send the body after another response
    // (RFC 9110, section 10.1.1).
    upstream_lasts_ &=
        upload_.finished() || download_.moved || !request_.find("Expect");
    keep_alive_ = request_.keep_alive && !until_close_ && upload_.finished() &&
                  !shared_.draining && !client_.is_evicted && !login_lost &&
                  (upstream_lasts_ || !client_.authenticated);
    endless_ = response.is_switching() ||
               starts_with_ignore_case(response.value("Content-Type"),
                                       "text/event-stream");
    if (endless_) { ++shared_.endless; }
    HeadWriter(request_, forwarding(), download_.head)
        .write_response(response, keep_alive_, lease_.server_timing);
  }

  // ---- Releasing the upstream connection

  void release_upstream() {
    if (!upstream_lasts_ || download_.framing.corrected() ||
        !upload_.finished() || !received_.empty() || upstream_->ended ||
        shared_.draining ||
        (!upstream_->authenticated && shared_.take_stall())) {
      return; // it is closed with the exchange
    }
    // A body may have been left unread, and a login belongs to its client:
    // nobody else gets this connection.
    if (!request_.framing.done() || upstream_->authenticated) {
      upstream_->client = &client_;
    }
    if (upstream_->client &&
        (shared_.config.behind_trusted_proxy() || !keep_alive_)) {
      worker_.pool.retire(std::move(upstream_));
    } else {
      worker_.pool.release(std::move(upstream_));
    }
  }

  Worker &worker_;
  Shared &shared_;
  Client &client_;
  const RequestHead &request_;
  int &sends_left_;
  const bool repeatable_; // the target may get it twice

  Lease lease_;
  std::unique_ptr<Upstream> upstream_;
  bool is_new_ = true;         // the upstream connection
  bool upstream_lasts_ = true; // after the response, as far as heads tell
  Buffer received_;            // from the target
  Flow upload_, download_;
  bool responding_ = false;  // the final response head has arrived
  bool until_close_ = false; // the client sees the response's end by a close
  bool endless_ = false;
  bool keep_alive_ = false;

  bool moved_ = false; // in this round of the pump
  Result result_ = Result::wait;
  Reply reply_;
  Time show_page_at_ = Time::max(); // the waiting page, to a browser
  Time check_at_ = Time::max();     // when check_progress() has to look
  milliseconds check_interval_{20}; // doubles up to 1 s
  Time stalled_at_ = Time::max();   // when to close idle ones for a new one
  bool has_stalled_ = false;
  bool half_closed_ = false;   // the client sends no more
  Time gone_at_ = Time::max(); // when a half-closed client counts as gone
};

// ---- Connection: one client, one request after the other --------------------

// A request, from its complete head to the end of its response.
struct Request {
  // One that is refused is an invocation as well, so its identifiers are looked
  // for in whatever has arrived.
  Request(Vercel *v, std::string_view text) : vercel(v) {
    if (!vercel) { return; }
    invocation_id =
        find_line(text, "x-vercel-internal-invocation-id").value_or("");
    request_id = find_line(text, "x-vercel-internal-request-id").value_or("");
  }
  ~Request() {
    exchange.reset();
    end_invocation();
  }

  // Reports the end of the invocation to the platform, once.
  void end_invocation() {
    if (!invocation_id.empty()) {
      vercel->end(invocation_id, request_id, background_work);
    }
    invocation_id.clear();
  }

  Vercel *const vercel;
  std::string invocation_id;       // empty: no `end` is sent
  std::string request_id;          // empty: it is sent as 0
  milliseconds background_work{0}; // of the target, after the response
  RequestHead head;
  int sends_left = WARMPROXY_MAX_ATTEMPTS;
  std::optional<Exchange> exchange;
};

class Connection : public Client {
public:
  // `over_limit`: the client gets a 503 and no more.
  Connection(Worker &worker, Descriptor fd, const SocketAddress &from,
             bool over_limit)
      : Client(worker.loop.buffers), worker_(worker), shared_(worker.shared),
        over_limit_(over_limit), response_(received, &socket) {
    socket.fd = std::move(fd);
    address = from.text();
    port = from.port();
  }
  ~Connection() override {
    // It was never posted, for lack of memory, and this is another thread.
    if (!socket.owner) { return; }
    worker_.idle_clients.leave(*this);
    request_.reset();
    worker_.pool.close_private(*this);
    worker_.loop.forget(socket);
    if (linger_until_) { --shared_.lingering; }
  }

  Next run() override {
    if (!socket.owner) { // it was constructed in another thread
      socket.owner = this;
      if (!worker_.loop.watch(socket)) { throw_errno("epoll_ctl"); }
      await_request();
    }
    if (shared_.aborting) {
      if (!loan_) { return Next::close; }
      // An own route is using the socket: disconnecting it ends the loan.
      if (!socket.broken) { disconnect(socket.fd.get()); }
    }
    for (int i = 0; i < WARMPROXY_STEPS_PER_TURN; ++i) {
      if (const auto next = step()) { return *next; }
    }
    return Next::yield;
  }
  Time deadline() const override { return deadline_; }
  void resumed() override { returned_ = loan_ != nullptr; }

private:
  using Step = std::optional<Next>; // nothing: go on

  Step step() {
    if (linger_until_) { return linger(); }
    if (!request_) { return read_request(); }
    if (loan_) { return await_return(); }
    return request_->exchange ? run_exchange() : send_response();
  }

  // ---- Reading a request

  void await_request() {
    request_.reset();
    searched_ = 0;
    const auto timeout =
        over_limit_ ? seconds(2) : shared_.config.keep_alive_timeout;
    deadline_ = timeout.count() ? worker_.after(timeout) : Time::max();
  }

  Step read_request() {
    while (starts_with(received.view(), "\r\n")) {
      received.consume(2); // RFC 9112, section 2.2
    }
    const auto bytes = received.view();
    if (bytes.empty()) {
      if (!over_limit_) { worker_.idle_clients.enter(*this); }
      if (shared_.draining || is_evicted) { deadline_ = Time::min(); }
      searched_ = 0;
      return receive();
    }
    if (searched_ == 0) {
      worker_.idle_clients.leave(*this);
      if (!over_limit_) {
        deadline_ = worker_.after(milliseconds(WARMPROXY_HEAD_TIMEOUT));
      }
    }
    if (const auto size = head_end(bytes, searched_)) {
      return begin_request(size);
    }
    const auto refusal = received.full()
                             ? Refusal{431, "the request head is too large"}
                             : early_refusal(bytes, searched_);
    searched_ = bytes.size();
    if (refusal) { return begin_request(searched_, refusal); }
    if (shared_.draining) { // the rest of a head has a second
      deadline_ = std::min(deadline_, worker_.after(seconds(1)));
    }
    const auto step = receive();
    return step == Next::close && is_late()
               ? begin_request(searched_,
                               {408, "the request head took too long"})
               : step;
  }

  bool is_late() const { return worker_.loop.now() >= deadline_; }

  // What has arrived is read before any deadline is judged.
  Step receive() {
    if (!socket.readable && !is_late()) { return Next::wait; }
    const auto n = received.receive(socket);
    if (n > 0) { return {}; }
    return n < 0 && would_block(errno) && !is_late() ? Next::wait : Next::close;
  }

  // `refusal`: why the head, of which `size` bytes have arrived, is not parsed.
  Step begin_request(std::size_t size, Refusal refusal = {}) {
    // A copy, since the buffer is refilled while the response is awaited.
    std::string text(received.view().substr(0, size));
    received.consume(size);
    auto &request = request_.emplace(shared_.vercel, text);
    if (!refusal) { refusal = parse_request(std::move(text), request.head); }
    if (!refusal && over_limit_) { refusal = {503, "too many connections"}; }
    return refusal ? refuse(refusal) : route_request(request);
  }

  Step refuse(Refusal refusal) {
    return respond(error_reply(request_->head, refusal.status, refusal.reason));
  }

  // Who responds, in the order of precedence.
  Step route_request(Request &request) {
    const auto &config = shared_.config;
    const auto &head = request.head;
    const auto path = head.path();
    if (shared_.vercel && path == "/_vercel/ping") {
      request.invocation_id.clear();
      return respond({200, {}, "text/plain; charset=utf-8", "OK"});
    }
    if (path == config.status_path) {
      return respond(status_reply(head, shared_.status()));
    }
    if (const auto server = shared_.find_route(path)) { return lend(*server); }
    if (is_preflight(head, config)) { return respond({204}); }
    if (const auto reply = call_pre_routing_handler(
            shared_.pre_routing_handler, head, *this, config, shared_.log)) {
      return respond(*reply);
    }
    if (ignores_forwarded_https(head, config)) {
      shared_.log.once("X-Forwarded-Proto: https ignored: the client is not "
                       "trusted (behind a proxy that ends TLS set "
                       "WARMPROXY_TRUST_PROXY=1, or redirects may loop)");
    }
    if (!head.is_safe()) { request.background_work = config.background_work; }
    return begin_exchange();
  }

  // ---- Own routes

  // The socket stays watched, but its events are ignored while it is lent.
  Step lend(RouteServer &server) {
    loan_ = std::make_unique<Loan>(*this, request_->head, shared_.config,
                                   is_evicted || shared_.draining);
    deadline_ = Time::max();
    if (!server.lend(*loan_, [this] { worker_.loop.resume(*this); })) {
      loan_.reset();
      return refuse({503, "too many requests for own routes"});
    }
    received.clear();
    return {};
  }

  Step await_return() {
    if (!std::exchange(returned_, false)) { return Next::wait; }
    socket.readable = socket.writable = true; // the next call finds out
    const auto loan = std::move(loan_);
    received.append(loan->received);
    if (!loan->must_reset) {
      return finish(loan->keep_alive && !shared_.draining);
    }
    reset_on_close(socket.fd.get());
    return Next::close;
  }

  // ---- An exchange with the target

  Step begin_exchange() {
    auto &request = *request_;
    request.exchange.emplace(worker_, *this, request.head, request.sends_left);
    return {};
  }

  Step run_exchange() {
    auto &exchange = *request_->exchange;
    const auto result = exchange.run();
    deadline_ = exchange.deadline();
    // On the platform an established tunnel counts as the response.
    if (exchange.tunnel_established()) { request_->end_invocation(); }
    switch (result) {
    case Exchange::Result::go_on: return {};
    case Exchange::Result::wait: return Next::wait;
    case Exchange::Result::done: return finish(exchange.keep_alive());
    case Exchange::Result::reply: return respond(exchange.reply());
    case Exchange::Result::retry: return begin_exchange();
    case Exchange::Result::abort: break;
    }
    return Next::close;
  }

  // ---- A response of our own

  // Ends the exchange, if there is one.
  Step respond(const Reply &reply) {
    const auto &head = request_->head;
    auto &exchange = request_->exchange;
    keep_alive_ = head.keep_alive && head.framing.done() && !over_limit_ &&
                  !is_evicted && !shared_.draining;
    response_.head = exchange ? exchange->unsent() : "";
    write_reply(reply, head, shared_.config, keep_alive_, response_.head);
    exchange.reset();
    deadline_ = worker_.after(milliseconds(WARMPROXY_SEND_TIMEOUT));
    return {};
  }

  Step send_response() {
    if (response_.can_write() && !response_.write()) { return Next::close; }
    if (!response_.pending()) { return finish(keep_alive_); }
    return is_late() ? Next::close : Next::wait;
  }

  Step finish(bool keep_alive) {
    if (keep_alive) {
      await_request();
      return {};
    }
    // Closing a socket with unread bytes resets it, and a reset overtakes the
    // response: so wait for the client to close first (RFC 9112, section 9.6).
    request_.reset();
    ::shutdown(socket.fd.get(), SHUT_WR);
    linger_until_ = worker_.after(seconds(over_limit_ ? 2 : 30));
    ++shared_.lingering;
    if (!over_limit_) { worker_.idle_clients.enter(*this); }
    deadline_ = worker_.after(seconds(2));
    return {};
  }

  Step linger() {
    if (worker_.loop.now() >= *linger_until_ || is_evicted) {
      return Next::close;
    }
    received.clear();
    const auto step = receive();
    if (!step) { deadline_ = worker_.after(seconds(2)); }
    return step;
  }

  Worker &worker_;
  Shared &shared_;
  const bool over_limit_;
  Time deadline_{};
  std::size_t searched_ = 0; // bytes without the end of a head
  std::optional<Request> request_;
  std::unique_ptr<Loan> loan_; // while an own route serves the connection
  bool returned_ = false;      // the own route has responded
  Flow response_;              // of our own
  bool keep_alive_ = false;    // after response_
  // Set once we have shut down our side: how long to wait for the client's.
  std::optional<Time> linger_until_;
};

// ---- Server: accepting, draining, the event loops' threads -----------------

class Server {
public:
  // Throws std::system_error. `vercel` may be null.
  Server(const Options &options, Vercel *vercel) : shared(options, vercel) {}
  // Stops, and waits for run() or listen() to return.
  ~Server() {
    stop();
    const std::lock_guard<std::mutex> lock(run_mutex_);
  }

  // Port 0 picks a free one. Returns the port, or -1, and errno where it is
  // known. cpp-httplib resolves the host and binds. Its accept loop is not
  // used: it ends for good on ECONNABORTED (a client that resets before it is
  // accepted) and spins on EMFILE.
  int bind(const std::string &host, int port) {
    if (has_run_) { return -1; }
    int fd = -1;
    httplib::Server binder; // leaves the socket open
    // cpp-httplib's default is SO_REUSEPORT: a second proxy on the same port
    // would take half the connections and never be noticed.
    binder.set_socket_options([&fd](socket_t created) {
      fd = created;
      set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    });
    // getaddrinfo(3) would take these for the loopback address.
    const bool any = host.empty() || host == "*";
    if (!binder.bind_to_port(any ? "0.0.0.0" : host, port)) { return -1; }
    listening_.fd.reset(fd);
    ::fcntl(fd, F_SETFL, O_NONBLOCK);
    // Old cpp-httplib has a backlog of 5: of many first requests at once, the
    // sixth would have to wait a second for its next SYN.
    ::listen(fd, SOMAXCONN);
    // Accepted connections inherit these options (on Linux).
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1); // finds clients that died
#ifdef __linux__
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 60);
#endif
    return local_address(listening_.fd).port();
  }

  // bind() and run() under one lock, so that the destructor waits for bind(),
  // too.
  bool listen(const std::string &host, int port) {
    const std::unique_lock<std::mutex> lock(run_mutex_, std::try_to_lock);
    return lock && bind(host, port) >= 0 && serve();
  }
  // Serves until stop(), drains, and returns once the target has stopped. False
  // if nothing is bound or can be watched, or if it was called before.
  bool run() {
    const std::unique_lock<std::mutex> lock(run_mutex_, std::try_to_lock);
    return lock && serve();
  }

  // From any thread.
  void stop() {
    shared.draining = true;
    shared.notify_all();
  }

  void require_not_listening(const char *function) const {
    if (has_run_) {
      throw std::logic_error(concat("warmproxy: Proxy::", function,
                                    "() must be called before listening"));
    }
  }

  // Whether we are in a child that was forked since: the threads and the target
  // are the parent's.
  bool is_forked_copy() const { return ::getpid() != owner_; }

  Shared shared;

private:
  bool serve() {
    if (has_run_.exchange(true) || is_forked_copy()) { return false; }
    if (!listening_.fd || !own_loop().watch(listening_)) { return false; }
    for (auto &[prefix, server] : shared.routes) {
      server.open(); // may throw, so before there are threads to join
    }
    if (shared.config.prewarm) { shared.supervisor.prewarm(); }
    start_loops();
    accept_until_stopped();
    drain();
    over_ = true;
    shared.notify_all();
    for (auto &thread : threads_) {
      thread.join();
    }
    for (auto &[prefix, server] : shared.routes) {
      server.close();
    }
    return true;
  }

  // The loop that serve() runs itself, and in which it accepts.
  Loop &own_loop() { return shared.workers.front()->loop; }

  void start_loops() {
    try {
      for (std::size_t i = 1; i < shared.workers.size(); ++i) {
        threads_.emplace_back([this, &loop = shared.workers[i]->loop] {
          while (!over_) {
            loop.turn(Time::max());
          }
        });
      }
    } catch (const std::system_error &) {} // no more threads: fewer will do
  }

  // Of the workers whose loops run, the one with the least `value`.
  template <typename F> Worker &least(F value) {
    const auto first = shared.workers.begin();
    const auto count = static_cast<std::ptrdiff_t>(threads_.size() + 1);
    return **std::min_element(first, first + count,
                              [value](const auto &a, const auto &b) {
                                return value(*a) < value(*b);
                              });
  }

  // ---- Server: accepting

  void accept_until_stopped() {
    while (!shared.draining) {
      own_loop().turn(listening_.readable ? paused_until_ : Time::max());
      accept_batch(64); // not for so long that clients have to wait
    }
    // Accepts what is in the backlog: those whose request has arrived are
    // served.
    listening_.readable = true;
    paused_until_ = {};
    accept_batch(std::numeric_limits<int>::max());
    own_loop().forget(listening_);
    // A child that the embedding program has forked may hold it: close(2) alone
    // would leave it listening.
    ::shutdown(listening_.fd.get(), SHUT_RDWR);
    listening_.fd.reset();
  }

  void accept_batch(int most) {
    const auto now = own_loop().now();
    for (; most > 0 && listening_.readable && now >= paused_until_; --most) {
      const auto count = shared.connections();
      const auto [limit, refused] = capacity();
      if (count >= limit + refused || !accept_one(count >= limit)) {
        paused_until_ = later(now, milliseconds(10));
      }
    }
  }

  // False if others have to free descriptors or memory first.
  bool accept_one(bool full) {
    try {
      SocketAddress address;
      Descriptor client(::accept4(listening_.fd.get(), address.get(),
                                  &address.size, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!client) { return on_accept_error(errno); }
      accept_fails_since_ = Time::max();
      const bool over_limit = full && !make_room();
      if (over_limit) {
        shared.log.once("too many connections, and none is idle: further ones "
                        "get 503 (see WARMPROXY_MAX_CONNECTIONS and the limit "
                        "on open files)");
      }
      auto &worker = least([](const Worker &w) { return w.loop.size(); });
      worker.loop.post(std::make_unique<Connection>(worker, std::move(client),
                                                    address, over_limit));
    } catch (const std::bad_alloc &) { return false; }
    return true;
  }

  // Returns like accept_one().
  bool on_accept_error(int error) {
    // accept4(2) needs a descriptor even to find that nobody waits.
    pollfd waiting{listening_.fd.get(), POLLIN, 0};
    listening_.readable = error != EAGAIN && ::poll(&waiting, 1, 0) > 0;
    if (!listening_.readable) { accept_fails_since_ = Time::max(); }
    if (!listening_.readable || would_block(error) || error == ECONNABORTED) {
      return true;
    }
    shared.log.once("cannot accept connections: ", error_text(error));
    // A shortage that lasts: an embedding program may have opened more files
    // than capacity() allows for. Idle connections make room.
    const auto now = own_loop().now();
    accept_fails_since_ = std::min(accept_fails_since_, now);
    const bool lacks = error == EMFILE || error == ENFILE || error == ENOBUFS ||
                       error == ENOMEM;
    if (lacks && now >= later(accept_fails_since_, seconds(1))) {
      make_room();
      shared.close_idle_upstreams();
    }
    return false;
  }

  // Evicts the client that is idle for longest. False if none is.
  bool make_room() {
    auto &clients = least([](const Worker &w) {
                      return w.idle_clients.oldest_idle_since();
                    }).idle_clients;
    if (clients.oldest_idle_since() == Time::max()) { return false; }
    clients.evict_oldest();
    return true;
  }

  // How many client connections are served, and how many more are accepted to
  // get a 503; any others wait in the backlog. Of the descriptors, each loop
  // needs three and its spare upstreams, the rest of us about 16, and a
  // connection two.
  std::pair<std::size_t, std::size_t> capacity() const {
    rlimit files{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    const rlim_t own =
        16 + (3 + WARMPROXY_SPARE_UPSTREAMS) * shared.workers.size();
    const auto room = std::max(files.rlim_cur, own) - own;
    const auto refused = std::clamp<rlim_t>(room / 4, 1, 16);
    const auto left = std::max<rlim_t>(room, refused + 2) - refused;
    return {std::min<rlim_t>(left / 2, shared.config.max_connections), refused};
  }

  // ---- Server: draining

  // One budget, stop_timeout. Requests are drained; when only those are left
  // that the target itself has to end, or half of the budget is used, the
  // target gets SIGTERM. What is left at the end of the budget is aborted.
  void drain() {
    auto &supervisor = shared.supervisor;
    const auto budget = clamped(shared.config.stop_timeout);
    const auto half = SteadyClock::now() + budget / 2;
    const auto deadline = half + budget / 2;
    supervisor.drain();
    while (const auto count = shared.connections()) {
      const auto now = SteadyClock::now();
      if (now >= half || count <= shared.endless + shared.lingering) {
        supervisor.stop(deadline);
      }
      if (now >= deadline && !shared.aborting.exchange(true)) {
        shared.log(concat(
            "aborted ", decimal(count), " connections: not finished within ",
            in_seconds(budget), " s (see WARMPROXY_STOP_TIMEOUT)"));
        for (auto &[prefix, server] : shared.routes) {
          server.abort();
        }
        shared.notify_all();
      }
      const auto next = now < half ? half : deadline;
      own_loop().turn(own_loop().now() + (next > now ? next - now : max_wait));
    }
    // This loop's own idle connections; the supervisor has the others closed.
    shared.close_idle_upstreams();
    own_loop().turn(own_loop().now());
    supervisor.stop(deadline);
    supervisor.join();
  }

  const pid_t owner_ = ::getpid();
  Socket listening_;
  Time paused_until_{};                   // accepting
  Time accept_fails_since_ = Time::max(); // max(): it does not
  std::mutex run_mutex_;                  // held by run() and listen()
  std::atomic<bool> has_run_{false}, over_{false};
  std::vector<std::thread> threads_; // of all loops but own_loop()
};

// ---- Settings: the environment and the command line -------------------------

// Splits as a POSIX shell would, without expansions. False if a quote is left
// open, or a backslash ends the text.
inline bool split_words(std::string_view text,
                        std::vector<std::string> &words) {
  words.clear();
  bool in_word = false;
  char quote = '\0';
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (!quote && (is_blank(c) || c == '\n')) {
      in_word = false;
      continue;
    }
    const bool escapes = c == '\\' && quote != '\'';
    if (escapes && ++i == text.size()) { return false; }
    if (escapes && text[i] == '\n') { continue; } // the line is continued
    if (!std::exchange(in_word, true)) { words.emplace_back(); }
    if (!escapes && (quote ? c == quote : c == '"' || c == '\'')) {
      quote = quote ? '\0' : c;
      continue;
    }
    // Between double quotes, a backslash escapes only these.
    if (escapes && quote && !contains("\"\\$`", text.substr(i, 1))) {
      words.back() += c;
    }
    words.back() += text[i];
  }
  return !quote;
}

// ---- Settings: reading values

// How a value is read from text. False if it cannot be.
inline bool read_value(std::string_view text, std::string &value) {
  value = text;
  return true;
}

inline bool read_value(std::string_view text, bool &value) {
  value = list_contains("1,true,yes,on", text);
  return value || list_contains("0,false,no,off", text);
}

inline bool read_value(std::string_view text, std::size_t &value) {
  return to_number(text, value);
}

inline bool read_value(std::string_view text, int &value) { // a port
  if (text == "auto") { return value = any_port, true; }
  return to_number(text, value);
}

template <typename Rep, typename Period>
bool read_value(std::string_view text,
                std::chrono::duration<Rep, Period> &value) {
  static const std::map<std::string_view, std::int64_t> units = {
      {"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}, {"d", 86400000}};
  const auto digits = text.substr(0, text.find_first_not_of("0123456789"));
  const auto unit = units.find(text == "0" ? "s" : text.substr(digits.size()));
  std::int64_t number = 0;
  // At most thirty years, which fit the nanoseconds of a clock.
  if (unit == units.end() || !to_number(digits, number) ||
      number > std::int64_t{1000000000000} / unit->second) {
    return false;
  }
  const milliseconds time(number * unit->second);
  value = std::chrono::duration_cast<std::chrono::duration<Rep, Period>>(time);
  return value == time; // no half seconds where seconds are counted
}

inline bool read_value(std::string_view text, std::vector<std::string> &value) {
  value.clear();
  for_each_element(text, [&](auto element) { value.emplace_back(element); });
  return true;
}

// ---- Settings: the table

// For the kernel and the resolver, which see the text up to the first NUL.
inline bool has_no_nul(std::string_view text) { return !contains(text, '\0'); }

inline bool is_path(std::string_view text) {
  return text.empty() || (text[0] == '/' && is_plain_ascii(text));
}

// RFC 6454, section 6.2: what browsers send, which has no path.
inline bool is_origin(std::string_view text) {
  const auto scheme = until(text, ':');
  const auto host = text.substr(scheme.size());
  return text == "*" || text == "null" ||
         (is_token(scheme) && starts_with(host, "://") && host.size() > 3 &&
          host.find_first_of("/*@", 3) == host.npos && is_clean(host));
}

template <bool (*check)(std::string_view)>
bool all(const std::vector<std::string> &texts) {
  return std::all_of(texts.begin(), texts.end(), check);
}

// A field of an Options object, for as long as that lives. A Proxy checks what
// a program has set by the same rules as the environment.
struct Setting {
  template <typename T, typename Check>
  Setting(std::string_view f, std::string_view h, T &value, std::string_view e,
          Check check, bool (*reader)(std::string_view, T &) = read_value)
      : field(f), help(h), expected(e),
        read([=, &value](auto text) { return reader(text, value); }),
        is_valid([=, &value] { return check(value); }) {}

  std::string_view field;
  std::string_view help;     // what it does
  std::string_view expected; // completes "X is not ..."
  std::function<bool(std::string_view text)> read;
  std::function<bool()> is_valid;

  std::string variable() const {
    // Platforms set PORT.
    const bool has_prefix = field != "host" && field != "port";
    auto name = concat(has_prefix ? "WARMPROXY_" : "", field);
    for (auto &c : name) {
      if (c >= 'a' && c <= 'z') { c = static_cast<char>(c - 32); }
    }
    return name;
  }
};

inline std::vector<Setting> settings(Options &o) {
  const auto within = [](auto least, auto most) {
    return [=](auto value) { return value >= least && value <= most; };
  };
  const auto is_time = [](auto time) { return time.count() >= 0; };
  const auto is_flag = [](bool) { return true; };
  constexpr auto a_flag = "1 or 0, true or false, yes or no, on or off";
  constexpr auto a_path =
      "a path that begins with '/', percent-encoded and without blanks";
  constexpr auto a_time = "a duration, such as 500ms, 45s, 10m, 2h or 30d";
  return {
      {"binary", "the program to run", o.binary,
       "the name or path of a program", has_no_nul},
      {"args", "its arguments, quoted as in a shell", o.args,
       "a list of arguments with all quotes closed", all<has_no_nul>,
       split_words},
      {"target_port", "its port; 0: a free one; auto: its own choice",
       o.target_port, "a port (0 to 65535) or auto", within(any_port, 65535)},
      {"directory", "its working directory", o.directory,
       "the path of a directory", has_no_nul},
      {"scratch", "where to make a writable copy of that", o.scratch,
       "the path of a directory", has_no_nul},
      {"strip_prefix", "path prefix to remove from requests", o.strip_prefix,
       "a path, percent-encoded and without blanks", is_plain_ascii},
      {"prewarm", "1: do not wait for the first request", o.prewarm, a_flag,
       is_flag},
      {"health_path", "path of the readiness probe; empty: connect",
       o.health_path, a_path, is_path},
      {"startup_timeout", "how long a start may take", o.startup_timeout,
       "a duration above 0, such as 500ms, 45s or 10m",
       within(milliseconds(1), milliseconds::max())},
      {"stop_timeout", "how long draining and stopping may take",
       o.stop_timeout, a_time, is_time},
      {"idle_stop", "stop after so long without requests; 0: never",
       o.idle_stop, a_time, is_time},
      {"background_work", "Vercel: how long work goes on after writes",
       o.background_work, a_time, is_time},
      {"max_connections", "simultaneous client connections", o.max_connections,
       "a number above 0", within(std::size_t{1}, SIZE_MAX)},
      {"keep_alive_timeout", "idle timeout of clients; 0: never",
       o.keep_alive_timeout, a_time, is_time},
      {"trust_proxy", "1: believe forwarding headers of clients", o.trust_proxy,
       a_flag, is_flag},
      {"cors_origins", "origins that may use it, with commas; *: any",
       o.cors_origins, "a list of origins (https://example.org), or *",
       all<is_origin>},
      {"cdn_cache", "how long a CDN may keep scripts and styles", o.cdn_cache,
       a_time, is_time},
      {"waiting_page_after", "when browsers get a page; 0: never",
       o.waiting_page_after, a_time, is_time},
      {"status_path", "path of status and metrics", o.status_path, a_path,
       is_path},
      {"port", "where we listen; 0: a free port", o.port, "a port (0 to 65535)",
       within(0, 65535)},
      {"host", "the address on which we listen", o.host, "an address",
       has_no_nul}};
}

// Whether Kubernetes may have set this variable for a Service whose name begins
// with "warmproxy": for "warmproxy-target", WARMPROXY_TARGET_PORT is a URL,
// "tcp://10.0.0.1:80".
inline bool is_of_service(std::string_view name, std::string_view value) {
  return contains(name, "_SERVICE_") || contains(name, "_PORT_") ||
         (ends_with(name, "_PORT") && contains(value, "://"));
}

// Reads the variables for which `lookup` returns a value, not null. The first
// one that cannot be read is named in Options::error.
template <typename Lookup>
Options read_settings(Options options, Lookup &&lookup) {
  if (lookup("WARMPROXY_BINARY")) { // the others belong to another program
    options.args.clear();
    options.target_port = 0;
  }
  for (const auto &setting : settings(options)) {
    const auto variable = setting.variable();
    const char *text = lookup(variable.c_str());
    if (text && !is_of_service(variable, text) && options.error.empty() &&
        !(setting.read(text) && setting.is_valid())) {
      options.error =
          concat(variable, "=\"", text, "\" is not ", setting.expected);
    }
  }
  return options;
}

// Returns "", or what cannot be served, naming the field.
inline std::string validate(Options options) {
  if (!options.error.empty()) { return options.error; }
  for (const auto &setting : settings(options)) {
    if (!setting.is_valid()) {
      return concat("Options::", setting.field, " is not ", setting.expected);
    }
  }
  if (options.binary.empty()) {
    return "Options::binary is empty: set it or WARMPROXY_BINARY";
  }
  auto texts = options.args; // of the target
  for (const auto &[name, value] : options.env) {
    if (name.empty() || contains(name, '=') || !has_no_nul(name + value)) {
      return concat("Options::env has a variable that cannot exist: \"", name,
                    "\"");
    }
    texts.push_back(value);
  }
  if (options.target_port == any_port &&
      std::any_of(texts.begin(), texts.end(),
                  [](auto &text) { return contains(text, "{port}"); })) {
    return "Options::target_port (WARMPROXY_TARGET_PORT) is auto: {port} in "
           "Options::args or Options::env has no value";
  }
  // With "/.", it must be a directory.
  if (!options.directory.empty() &&
      ::access((options.directory + "/.").c_str(), F_OK) != 0) {
    return concat("Options::directory (WARMPROXY_DIRECTORY) \"",
                  options.directory, "\": ", error_text(errno));
  }
  return {};
}

// A warning for a variable ("NAME=value") that looks like a setting but is
// none; empty for all others.
inline std::string unknown_setting(std::string_view variable) {
  const auto name = until(variable, '=');
  if (!starts_with(name, "WARMPROXY_") ||
      is_of_service(name, behind(variable, '='))) {
    return {};
  }
  Options none;
  for (const auto &setting : settings(none)) {
    if (setting.variable() == name) { return {}; }
  }
  return printable(concat(name, " is not a setting: ignored; see --help"));
}

// ---- Settings: the command line

// A command takes the place of the program. Our own options end with the first
// argument that is none, or with "--".
inline void apply_command_line(int argc, const char *const *argv,
                               Options &options) {
  const std::string_view first = argc > 1 ? argv[1] : "--";
  const int command = first == "--" ? 2 : 1;
  if (command == 1 && starts_with(first, "-")) {
    options.error = concat(first, " is not an option; see --help");
  } else if (command < argc) {
    options.binary = argv[command];
    options.args.assign(argv + command + 1, argv + argc);
    if (environment_variable("WARMPROXY_TARGET_PORT").empty()) {
      options.target_port = 0;
    }
  }
}

inline std::string help_text() {
  std::string text =
      "warmproxy " WARMPROXY_VERSION ": a lazy-starting reverse proxy\n\n"
      "Usage: warmproxy [--] [PROGRAM [ARGUMENT]...]\n"
      "       warmproxy --help | --version\n\n"
      "In an ARGUMENT, {port} is PROGRAM's port. The settings are variables\n"
      "of the environment:\n\n";
  Options none;
  for (const auto &setting : settings(none)) {
    auto name = setting.variable();
    name.resize(30, ' ');
    append(text, "  ", name, setting.help, "\n");
  }
  return text;
}
} // namespace detail

// ---- Proxy ------------------------------------------------------------------

class Proxy::Impl : public detail::Server {
public:
  using Server::Server;
};

inline Proxy::Proxy(Options options) {
  const auto error = detail::validate(options);
  if (!error.empty()) { throw std::invalid_argument("warmproxy: " + error); }
  impl_ = std::make_unique<Impl>(options, nullptr);
}

inline Proxy::~Proxy() {
  if (impl_->is_forked_copy()) { static_cast<void>(impl_.release()); }
}

inline bool Proxy::listen(const std::string &host, int port) {
  return impl_->listen(host, port);
}

inline int Proxy::bind_to_any_port(const std::string &host) {
  return impl_->bind(host, 0);
}

inline bool Proxy::listen_after_bind() { return impl_->run(); }

inline void Proxy::stop() { impl_->stop(); }

inline Status Proxy::status() const { return impl_->shared.status(); }

inline httplib::Server &Proxy::routes(std::string prefix) {
  impl_->require_not_listening("routes");
  const auto path = detail::normalized_prefix(prefix);
  if (path.empty() || !detail::is_plain_ascii(path)) {
    throw std::invalid_argument(detail::concat(
        "warmproxy: Proxy::routes: prefix \"", prefix,
        "\" is not a path below \"/\", percent-encoded and without blanks"));
  }
  return impl_->shared.routes[path];
}

inline void
Proxy::set_pre_routing_handler(httplib::Server::HandlerWithResponse handler) {
  impl_->require_not_listening("set_pre_routing_handler");
  impl_->shared.pre_routing_handler = std::move(handler);
}

// ---- options_from_env -------------------------------------------------------

inline Options options_from_env(Options defaults) {
  const detail::Log log(defaults);
  for (auto variable = environ; variable && *variable; ++variable) {
    const auto warning = detail::unknown_setting(*variable);
    if (!warning.empty()) { log(warning); }
  }
  return detail::read_settings(std::move(defaults), std::getenv);
}

// ---- serve ------------------------------------------------------------------

namespace detail {

// Opens descriptors 0 to 2 where they are closed: otherwise the next file to be
// opened would receive what is written to stderr.
inline void open_standard_descriptors() {
  int fd = 0;
  while (fd >= 0 && fd <= STDERR_FILENO) {
    fd = ::open("/dev/null", O_RDWR);
  }
  Descriptor(fd).reset(); // one too many
}

// The settings as serve() uses them. Throws std::invalid_argument.
inline Options serve_options(Options options, bool on_vercel) {
  if (on_vercel) { adapt_to_vercel(options); }
  const auto error = validate(options);
  if (!error.empty()) { throw std::invalid_argument(error); }
  try {
    find_program(options.binary);
  } catch (const std::runtime_error &reason) {
    throw std::invalid_argument(
        concat("cannot run ", reason.what(), " (see WARMPROXY_BINARY)"));
  }
  if (options.target_port > 0 && options.target_port == options.port) {
    throw std::invalid_argument("Options::target_port (WARMPROXY_TARGET_PORT) "
                                "is the port on which we listen (PORT)");
  }
  return options;
}

inline void raise_file_limit() {
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
}

// ---- serve: signals

// Blocks the signals that serve() waits for, and returns them; sets the actions
// of SIGPIPE, SIGXFSZ and SIGCHLD. To be called before there are threads, which
// inherit the mask.
inline sigset_t set_up_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGCHLD);
  // SIGQUIT is the stop signal of many an image, nginx's among them.
  for (const int number : {SIGINT, SIGHUP, SIGQUIT}) {
    struct sigaction action = {};
    ::sigaction(number, nullptr, &action); // nohup(1) has it ignored
    if (action.sa_handler != SIG_IGN) { sigaddset(&signals, number); }
  }
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN); // as cpp-httplib does, but before the first write
  ::signal(SIGXFSZ, SIG_IGN); // a write beyond RLIMIT_FSIZE returns an error
  // If whoever started us ignores SIGCHLD, the kernel reaps the target itself
  // and its exit status is lost. With the default action, a SIGCHLD may be
  // discarded before sigtimedwait(2) sees it.
  ::signal(SIGCHLD, [](int) {});
  return signals;
}

// Reaps what PID 1 inherits, but not the target, whose status the supervisor
// wants. waitid(2) may keep returning the target until it is reaped: then this
// returns true, and is to be called again.
inline bool reap_orphans(const Supervisor &supervisor) {
  siginfo_t info{};
  while (::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
         info.si_pid > 0) {
    if (supervisor.owns(info.si_pid)) { return true; }
    ::waitpid(info.si_pid, nullptr, WNOHANG);
    info.si_pid = 0;
  }
  return false;
}

// Stops the server at the first of `signals`, which are blocked, and ends the
// process at the second. As PID 1, it also reaps orphans. Returns after `over`
// was set and a SIGCHLD was sent to this thread.
inline void handle_signals(Server &server, const sigset_t &signals,
                           const std::atomic<bool> &over) {
  const auto &shared = server.shared;
  const timespec briefly{0, 100'000'000};
  while (!over) {
    const bool again = ::getpid() == 1 && reap_orphans(shared.supervisor);
    const int number = again ? ::sigtimedwait(&signals, nullptr, &briefly)
                             : ::sigwaitinfo(&signals, nullptr);
    if (number <= 0 || number == SIGCHLD) { continue; }
    if (shared.draining) { ::_exit(128 + number); }
    server.stop();
    if (shared.vercel) { shared.vercel->flush(); }
    // Some send two at once: timeout(1) to us and to our process group, foreman
    // SIGTERM after the terminal's SIGINT.
    const auto until = SteadyClock::now() + milliseconds(100);
    while (!over && SteadyClock::now() < until) {
      ::sigtimedwait(&signals, nullptr, &briefly);
    }
    shared.log(
        "stopping: running requests may finish; a second signal ends them");
  }
}

// ---- serve: the sequence

// Serves until a signal of `signals`, which are blocked. Throws
// std::runtime_error.
inline void serve_until_signal(Server &server, const sigset_t &signals) {
  auto &shared = server.shared;
  const auto &config = shared.config;
  errno = 0;
  const int port = server.bind(config.host, config.port);
  const int error = errno; // getaddrinfo(3) leaves it alone
  const auto address =
      concat(config.host, ":", decimal(port < 0 ? config.port : port));
  if (port < 0) {
    throw std::runtime_error(concat(
        "cannot listen on ", address, ": ",
        error ? error_text(error) : "no such address", " (see HOST and PORT)"));
  }
  shared.log(printable(concat(
      "listening on ", address, "; ", config.binary,
      config.prewarm ? " starts now" : " starts with the first request")));
  std::atomic<bool> over{false};
  std::thread thread([&] { handle_signals(server, signals, over); });
  if (shared.vercel) { shared.vercel->started(port); }
  const bool good = server.run();
  over = true;
  ::pthread_kill(thread.native_handle(), SIGCHLD);
  thread.join();
  if (!good) { throw std::runtime_error("cannot accept connections"); }
}

} // namespace detail

inline int serve(Options options, int argc, const char *const *argv) {
  detail::open_standard_descriptors();
  const std::string_view argument = argc > 1 ? argv[1] : "";
  if (argument == "--help" || argument == "-h") {
    return std::fputs(detail::help_text().c_str(), stdout) < 0;
  }
  if (argument == "--version") {
    return std::puts("warmproxy " WARMPROXY_VERSION) < 0;
  }
  detail::apply_command_line(argc, argv, options);

  const auto signals = detail::set_up_signals();
  const detail::Log log(options);
  std::unique_ptr<detail::Vercel> vercel;
  const auto give_up = [&](int status, const std::string &reason) {
    const auto line = detail::printable(reason);
    log(line);
    if (vercel) { vercel->unrecoverable(status, line); }
    return status;
  };
  try {
    vercel = detail::Vercel::connect(log);
    detail::Server server(
        detail::serve_options(std::move(options), vercel != nullptr),
        vercel.get());
    detail::raise_file_limit(); // the target keeps what we were given
    detail::serve_until_signal(server, signals);
    return 0;
  } catch (const std::invalid_argument &error) {
    return give_up(2, error.what());
  } catch (const std::system_error &error) {
    return give_up(1, detail::concat("cannot start: ", error.what(),
                                     " (see the limits on open files and "
                                     "processes)"));
  } catch (const std::exception &error) { return give_up(1, error.what()); }
}
} // namespace v0_2_0
} // namespace warmproxy

#endif // WARMPROXY_HPP
