//
//  warmproxy.hpp
//
//  Runs a finished HTTP server program where only "a function" is allowed: the
//  first request starts it, we wait until it is up, then hand every byte
//  through.
//
//  The way of a request, which is also the order of this file:
//
//    client -- Listener -- Loop -- Connection -- Supervisor -- Upstream --
//    target
//
//    1. Listener accepts, and gives each connection to a Loop: a thread a
//       processor, in which whatever has news goes on until it would have to
//       wait.
//    2. Connection reads one request head, strictly, and knows its framing.
//    3. Supervisor, one thread, owns the target's whole life. Requests wait for
//       it to say "up"; none of them ever touches the process.
//    4. The head goes to the target with a few lines changed, and one pump
//       moves bytes in both directions until the framing says done, or for
//       ever after a 101. Streams, uploads, early answers and WebSockets are
//       all this one pump. Nothing is buffered beyond one block a direction.
//
//  RFC 9110 is HTTP's semantics, RFC 9112 its messages on the wire.
//
//  Refused on purpose: TLS and HTTP/2 to the client (the platform's edge does
//  them), caching, compression, load balancing, and CONNECT.
//
//  Copyright (c) 2026 warmproxy contributors. MIT License.
//

#ifndef WARMPROXY_HPP
#define WARMPROXY_HPP

#define WARMPROXY_VERSION "0.1.0"

#include "httplib.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
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
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

extern char **environ; // POSIX has it, no header of POSIX declares it

namespace warmproxy {

// What to run, when it is up, where we listen and what we say. Every field can
// be left as it is but `binary`. options_from_env() reads each from
// WARMPROXY_<FIELD>, in capitals, but for `env`, `log` and `error`.
struct Options {
  // The program to run. With a '/' in it, it is looked for from the current
  // directory, then beside this executable; without one, on PATH.
  std::string binary;
  // Its arguments; "{port}" in one stands for the target's port.
  std::vector<std::string> args;
  // The port it listens on, on 127.0.0.1 or ::1. 0: a free one is picked at
  // each start. The target is told it as $PORT in any case. If something
  // answers on a port given here before we start the target, we serve from
  // that and start nothing.
  int target_port = 0;
  // Added to the target's environment, over what is inherited; "{port}" as
  // above. HOST, WARMPROXY_* and VERCEL_IPC_PATH are never inherited.
  std::map<std::string, std::string> env;
  // Its working directory; "": ours.
  std::string directory;
  // Where to make a writable copy of `directory` before the first start, to
  // run the target in. "": it is run in place. A binary that lies within
  // `directory` is run from the copy too, for many write beside themselves.
  // A file that is newer in the copy is kept.
  std::string scratch;
  // Taken off the front of the path, on a segment boundary, and told to the
  // target as X-Forwarded-Prefix. "": nothing.
  std::string strip_prefix;
  // Start the target when we begin to listen, not with the first request.
  bool prewarm = false;

  // The target is up when GET of this path answers with a status below 500,
  // for some listen long before they can serve. "": when it accepts a
  // connection.
  std::string health_path = "/";
  // How long a start may take before it is given up and answered 504. 45 s:
  // under the 60 s at which many platforms' edges give up on us.
  std::chrono::milliseconds startup_timeout{45000};
  // How long the target has between SIGTERM and SIGKILL, both sent to its
  // whole process group; and running requests, between stop() and their end.
  std::chrono::milliseconds stop_timeout{10000};
  // The target is stopped when it had nothing to do for so long, counted from
  // the end of the last request, stream or tunnel. 0: never.
  std::chrono::milliseconds idle_stop{0};

  // Where serve() listens. Port 0: a free one, named in the log.
  std::string host = "0.0.0.0";
  int port = 3000;
  // Client connections at once; more are answered 503. It is lowered to what
  // the limit on open files has room for, two each.
  std::size_t max_connections = 1024;

  // The origins whose pages may use the target, as "https://example.org"; "*"
  // is any. {}: CORS is left to the target. Otherwise preflights are answered
  // here, and the origin is echoed with credentials allowed: with "*", any page
  // can use a visitor's cookies.
  std::vector<std::string> cors_origins;
  // How long a CDN may keep scripts and style sheets. 0: what the target says.
  std::chrono::seconds cdn_cache{0};
  // A person (a GET for a page) who would wait longer than this for a start
  // sees a page that says so and moves on by itself. 0: never.
  std::chrono::milliseconds waiting_page_after{5000};
  // The path at which we answer our own status, as JSON, or as Prometheus
  // metrics for who asks so. "": none. Anyone who reaches us can read it.
  std::string status_path;
  // Takes each message, one line without its end, from any thread. Empty: they
  // go to stderr behind "[warmproxy] ".
  std::function<void(std::string_view)> log;

  // What options_from_env() could not read, naming variable and value; serve()
  // prints it and returns 2, Proxy throws it.
  std::string error;
};

// A moment's view of a Proxy.
struct Status {
  std::string state = "cold";          // or "starting", "up", "stopping"
  long pid = 0;                        // of the target; 0: none, or not ours
  int port = 0;                        // the target's; 0: none picked yet
  std::uint64_t starts = 0;            // times it was started, or found running
  std::string last_exit;               // how it ended last; "": it never did
  std::chrono::milliseconds up_for{0}; // 0 unless up
  std::chrono::milliseconds last_start{0}; // how long the last good start took
  std::uint64_t requests = 0;              // handed to the target so far
  std::size_t in_flight = 0;   // requests, streams, tunnels with it now
  std::size_t connections = 0; // of clients, open now
};

namespace detail {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using Log = std::function<void(std::string_view)>;

// RFC 9112, section 3 asks for 8,000 bytes of request line at least; 64 KB of
// head is where the strictest of common targets stop too.
inline constexpr std::size_t max_head = 64 * 1024;
// A line costs us 48 bytes beside its own, so that 64 KB of "a:" would be a
// megabyte. Node takes 2000, Apache and HAProxy about 100.
inline constexpr std::size_t max_fields = 1000;
// Of what Connection names; each line is compared with all of it.
inline constexpr std::size_t max_hop = 100;
// Of a body at once: what a busy stream keeps of memory.
inline constexpr std::size_t max_portion = 32 * 1024;
// A client that has sent nothing for so long is let go; nginx's default.
inline constexpr std::chrono::seconds idle_limit{75};
// From a head's first byte to its last: what slow heads can hold us for.
inline constexpr std::chrono::seconds head_limit{30};
// A target's connection kept longer than this is as good as closed: Node and
// uvicorn close theirs after 5 s, most after 60 s.
inline constexpr std::chrono::seconds kept_limit{20};
// Within this time, one is good enough also for what must not be sent twice.
inline constexpr milliseconds fresh_limit{1000};
// A client that sends no more has most likely gone, and is never answered then;
// but one that only said all it had to say gets an answer that comes at once.
inline constexpr milliseconds farewell_limit{100};
// What one connection may move before the others have their turn.
inline constexpr int portions_a_turn = 8;
// A Loop has no more connections to the target than to clients, but for these:
// clients that come for one request each find one, too.
inline constexpr std::size_t spare_upstreams = 4;
// A target that says nothing for so long may be waiting for the end of a
// connection that we only keep: some serve one at a time.
inline constexpr milliseconds stall_limit{250};
// Threads that serve connections: one a processor, but no more than these.
inline constexpr unsigned max_loops = 4;
// How often a request may be handed over before its target is to blame.
inline constexpr int max_attempts = 5;

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

// Tells where a message's body ends, of bytes that arrive in any portions.
class Framing {
public:
  enum class Mode { none, length, chunked, until_close, tunnel };

  Framing() = default;
  explicit Framing(Mode mode, std::uint64_t length = 0)
      : mode_(mode), left_(length),
        done_(mode == Mode::none || (mode == Mode::length && length == 0)) {}

  // How many of `bytes` are this body's; done() is true once its end was among
  // them, malformed() if what follows them cannot be. Appends what they carry,
  // less the framing, to `content` if there is one.
  std::size_t take(std::string_view bytes, std::string *content = nullptr);

  Mode mode() const { return mode_; }
  bool done() const { return done_; }
  bool malformed() const { return state_ == State::malformed; }
  void close() { done_ = true; }

private:
  // Where we are in RFC 9112, section 7.1's grammar: the next byte is ...
  enum class State {
    size_first, // the first digit of a chunk's size
    size,       // a further one, or the end of the size
    extension,  // in a chunk extension
    size_lf,    // the LF of a size line
    data,       // in a chunk's data
    data_cr,    // the CR behind them
    data_lf,    // the LF behind them
    line_first, // the first of a trailer line, or of the empty one
    name,       // in a trailer's name
    value,      // in a trailer's value
    value_lf,   // the LF of a trailer line
    last_lf,    // the LF of the empty line
    malformed
  };

  State step(char c);

  Mode mode_ = Mode::none;
  std::uint64_t left_ = 0;   // bytes of the body, or of this chunk
  std::size_t overhead_ = 0; // bytes of this size line, or of the trailers
  State state_ = State::size_first;
  bool done_ = true;
};

// A header line: the whole of it, and its parts.
struct Field {
  std::string_view name, value, line;
};

// A message's head. Its views point into the text it was read from.
struct Head {
  std::string_view method, target;   // of a request
  std::string_view authority;        // where the target was in absolute-form
  int status = 0;                    // of a response,
  std::string_view reason;           // and all behind the version: "200 OK"
  int minor = 1;                     // the x of HTTP/1.x
  std::vector<Field> fields;         // in their order
  std::vector<std::string_view> hop; // what Connection names
  std::uint64_t length = 0;          // Content-Length's
  Framing framing;                   // of the body that follows
  bool keep_alive = false;           // as version and Connection say
  bool upgrade = false;              // Connection and Upgrade ask for one

  const Field *find(std::string_view name) const;
  std::string_view value(std::string_view name) const;
  bool names(std::string_view hop_by_hop) const;
};

// Why a head is refused, and with which status; 0: it is not.
struct Refusal {
  int status = 0;
  const char *reason = "";
};

// Where the head that begins `bytes` ends, behind its empty line; 0: not yet.
// Nothing before `from` is looked at again.
std::size_t head_end(std::string_view bytes, std::size_t from = 0);
Refusal parse_request(std::string_view text, Head &head);
// `to` is the method of the request that it answers.
Refusal parse_response(std::string_view text, std::string_view to, Head &head);

class Connection;

// A socket that a Loop watches, and what is known of it: true until a call
// finds otherwise. So no system call is ever made in vain, nor one to ask anew.
struct Socket {
  Descriptor fd;
  Connection *user = nullptr; // whom news of it are for
  bool readable = false;
  bool writable = true;
  bool ended = false;  // the peer sends no more than what is here
  bool broken = false; // nor does it read
};

// Tells which sockets have news: each is added once and is edge-triggered, for
// to change what is asked costs as much as to read.
class Poller {
public:
  Poller();

  // False, and errno, if the kernel has no room for it.
  bool add(Socket &socket);
  void remove(Socket &socket);
  // Waits until `until`, or for news; next() then gives each socket that has
  // some, and null when that was all.
  void wait(Clock::time_point until);
  Socket *next();

private:
#ifdef __linux__
  Descriptor epoll_;
#else
  std::vector<Socket *> sockets_;
#endif
  std::vector<Socket *> news_;
  std::size_t next_ = 0;
};

// Memory for blocks. It is the kernel's own: of it only what was ever filled is
// really there, and all of it is given back, which a heap does not. The few
// that were used last are used next, so that they stay in the processor's
// cache.
class Pages {
public:
  Pages() = default;
  ~Pages();
  Pages(const Pages &) = delete;
  Pages &operator=(const Pages &) = delete;

  char *take();
  void give(char *page);

private:
  std::vector<char *> spare_;
};

// A direction's one buffer, as large as the largest head. It has memory only
// while there is something in it.
class Block {
public:
  explicit Block(Pages &pages) : pages_(pages) {}
  ~Block() { clear(); }
  Block(const Block &) = delete;
  Block &operator=(const Block &) = delete;

  std::string_view view() const { return {data_ + begin_, end_ - begin_}; }
  bool empty() const { return begin_ == end_; }
  bool full() const { return end_ - begin_ == max_head; }
  void consume(std::size_t n);
  void clear();
  // As recv(2) that never waits, to behind what is there. `more`: a further one
  // can find something.
  ssize_t receive(int fd, bool &more);

private:
  Pages &pages_;
  char *data_ = nullptr;
  std::size_t begin_ = 0, end_ = 0;
};

// A process of ours that outlives us by a moment. Should we be killed, its pipe
// ends and it kills the target's group: PR_SET_PDEATHSIG reaches the target
// alone, not what the target has forked.
class Guard {
public:
  Guard();
  ~Guard();
  Guard(const Guard &) = delete;
  Guard &operator=(const Guard &) = delete;

  // Takes the pid_t of the group to kill, 0 for none. -1 if there is no guard.
  int pipe() const { return pipe_.get(); }

private:
  Descriptor pipe_;
  pid_t pid_ = -1;
};

class Supervisor;

// A request's leave to use the target, which does not rest as long as it lives.
struct Lease {
  Lease() = default;
  Lease(Lease &&) = delete;
  ~Lease();

  Supervisor *owner = nullptr;  // null: not granted yet
  std::uint64_t generation = 0; // which life of the target this is
  int port = 0;
  bool ipv6 = false;
  Descriptor proof; // the connection that proved it up, for the first to come
  // If it had to wait: since when, how long, and what the start took.
  Clock::time_point since{};
  std::uint64_t failures = 0; // of starts, before it waited
  Clock::duration waited{}, spawning{}, readying{};
  std::string timing() const; // the same as a header line, if it had to
};

// Starts, proves, watches and stops the target, all from one thread: only one
// spawn can ever be under way, no lock guards the process, and the thread that
// PR_SET_PDEATHSIG follows lives as long as we do.
//   cold -> starting -> up -> stopping -> cold
// `starting` is also where an `up` target goes that refused a connection, until
// it is known whether it is dead.
class Supervisor {
public:
  Supervisor(const Options &options, const Log &log);
  ~Supervisor();
  Supervisor(const Supervisor &) = delete;
  Supervisor &operator=(const Supervisor &) = delete;

  // What acquire() came to: the lease is granted, or has to be asked for again
  // after a change, or `status` and what follows is the answer to give.
  struct Result {
    bool pending = false;
    int status = 0;
    std::string reason; // "": it is still starting, though `until` has come
    milliseconds retry_after{0};
    Clock::duration waited{}; // for how long it has been
  };
  // Starts the target where need be.
  Result acquire(Lease &lease, Clock::time_point until);
  // What to call, from any thread, when it may be worth to ask again.
  void on_change(std::function<void()> tell);
  // Whether this life of the target goes on.
  bool is_up(std::uint64_t generation) const;
  // The target behind this lease did not answer: is it still there?
  void suspect(const Lease &lease);
  void release();
  // Start it now.
  void warm();
  // Stop it, for good. Does not wait.
  void quit();
  Status status() const;

private:
  enum class State { cold, starting, up, stopping };
  using Lock = std::unique_lock<std::mutex>;

  void run();
  bool start(Lock &lock);
  bool prove(Lock &lock, bool starting, Clock::time_point deadline,
             Descriptor connection);
  Descriptor reach();
  void watch(Lock &lock);
  void end(Lock &lock);
  bool spawn(std::string &error);
  bool probe(Descriptor &connection, Clock::time_point deadline,
             std::string &seen);
  bool exited();
  bool group_ended() const;
  void fail(Lock &lock, int status, std::string reason);
  void changed();
  milliseconds next_pause() const;
  bool nap(Clock::time_point until, int fd = -1);
  void nap(Lock &lock, Clock::time_point until);
  void wake();
  void tell_guard(pid_t group) const;

  const Options &options_;
  const Log &log_;
  Guard guard_;
  Descriptor wake_read_, wake_write_;

  // The thread's own.
  Descriptor pidfd_;
  std::string exit_;       // how the target ended; "": it did not
  rlimit files_{};         // what we were given, before serve() took more
  bool scratched_ = false; // the copy is made

  // Everybody's, under mutex_.
  mutable std::mutex mutex_;
  std::function<void()> tell_;
  State state_ = State::cold;
  bool wanted_ = false, suspected_ = false;
  std::atomic<bool> quit_{false};
  pid_t pid_ = 0; // 0: none, or not ours
  int port_ = 0;
  bool ipv6_ = false;
  std::uint64_t generation_ = 0, starts_ = 0, requests_ = 0;
  Clock::time_point started_; // written by the thread alone
  std::size_t in_flight_ = 0;
  Descriptor proof_;           // a connection that proved it up,
  Clock::time_point proved_{}; // and when
  Clock::time_point last_use_, up_since_;
  Clock::duration spawning_{}, readying_{};
  std::string last_exit_;
  std::uint64_t failures_ = 0; // starts that came to nothing,
  struct {
    int status = 0;
    std::string reason;
  } failure_;             // the last one,
  milliseconds pause_{0}; // and how long to leave it alone after it
  Clock::time_point not_before_{};

  std::thread thread_;
};

// Vercel's side of the contract: the Unix socket of a function of runtime
// `executable`. Reference: internals/ipc-proxy in vercel/vercel.
class Vercel {
public:
  // Null when VERCEL_IPC_PATH is unset or cannot be connected.
  static std::unique_ptr<Vercel> connect();

  void started(milliseconds took, int port);
  void end(std::string_view invocation, std::string_view request);
  void unrecoverable(int exit_code, std::string_view message);
  ~Vercel();

private:
  void send(std::string message);
  void flush();
  void write_waiting();

  Descriptor socket_;
  std::mutex mutex_;
  std::string waiting_; // what the platform has not taken yet
  std::condition_variable more_;
  bool over_ = false;
  std::thread writer_; // where it is slow to take it; mostly there is none
};

// A connection to the target, in use or kept for the next request.
struct Upstream : Socket {
  std::uint64_t generation = 0; // of the target
  Clock::time_point since{};    // when it was kept
};

class Listener;

// One thread, and the connections that are its own: whatever has news goes on
// until it would have to wait.
class Loop {
public:
  explicit Loop(Listener &listener);
  ~Loop();
  Loop(const Loop &) = delete;
  Loop &operator=(const Loop &) = delete;

  // From any thread: here is a connection to serve; look what has changed, with
  // the target or the Listener; or just wake up.
  void adopt(Descriptor client, std::string peer, bool crowded);
  void tell(bool let_kept_go = false);
  void wake();
  std::size_t size() const { return size_; }

  // From its own: waits for news, until `until` at the latest, and deals with
  // them.
  void turn(Clock::time_point until);
  Clock::time_point now() const { return now_; } // when this turn began
  bool watch(Socket &socket) { return poller_.add(socket); }
  void forget(Socket &socket) { poller_.remove(socket); }
  // A connection of this life of the target, kept for less than `oldest`; null
  // if there is none. With `care`, it has said nothing this very moment.
  std::unique_ptr<Upstream> take(std::uint64_t generation, milliseconds oldest,
                                 bool care);
  // Null, and errno, if there is no room for it.
  std::unique_ptr<Upstream> open(Descriptor fd, std::uint64_t generation);
  void keep(std::unique_ptr<Upstream> upstream);
  void drop(std::unique_ptr<Upstream> upstream);

  Listener &listener;
  Pages pages;

private:
  struct Arrival {
    Descriptor client;
    std::string peer;
    bool crowded;
  };

  void greet();
  void attend();
  void go_on(Connection &connection);
  void schedule(Connection &connection, Clock::time_point when);
  void end(Connection &connection);
  void look_at_kept(const Socket &socket);
  void drop_oldest();
  void limit_kept();

  Poller poller_;
  Socket woken_;
  Descriptor wake_;
  std::atomic<bool> told_{false}, let_kept_go_{false};
  std::mutex mutex_; // of arrivals_
  std::vector<Arrival> arrivals_;
  std::atomic<std::size_t> size_{0}; // with those that arrive

  Clock::time_point now_ = Clock::now();
  std::list<Connection> connections_;
  std::set<std::pair<Clock::time_point, Connection *>> timers_;
  std::vector<std::unique_ptr<Upstream>> kept_; // the last one last
  std::size_t upstreams_ = 0;                   // with those in use
};

// Binding and the socket are httplib::Server's. Its accept loop is not used: it
// ends for good when a client resets before it was accepted (ECONNABORTED), and
// spins when descriptors run out (EMFILE); and it cannot tell who connected.
class Listener : private httplib::Server {
public:
  Listener(const warmproxy::Options &o, const Log &l, Supervisor &s, Vercel *v);
  ~Listener() override;

  // Returns the port, or -1. Port 0: a free one.
  int bind(const std::string &host, int port);
  // Accepts until stop(), then lets running requests finish.
  bool run();
  void stop();

  void left(); // a connection has
  // Tells all Loops: see Loop::tell().
  void tell_all(bool let_kept_go = false);
  bool draining() const { return draining_; }
  bool cutting() const { return cutting_; }
  std::size_t connections() const;

  const warmproxy::Options &options; // Options alone is a method of httplib's
  const Log &log;
  Supervisor &supervisor;
  Vercel *const vercel;
  const std::string strip_prefix; // of Options, as "/a/b" or ""

private:
  std::size_t capacity() const;
  bool accept();

  std::vector<std::unique_ptr<Loop>> loops_; // the first one accepts, too
  std::size_t running_ = 1;                  // of them
  Socket listening_;
  Clock::time_point paused_until_{};
  std::atomic<bool> draining_{false}, cutting_{false}, waiting_for_room_{false};
  Clock::time_point complain_at_{}; // again, of too many connections
};

// One client's connection: its requests, one after the other.
class Connection {
public:
  Connection(Loop &loop, Descriptor client, std::string peer, bool crowded);
  ~Connection();
  Connection(const Connection &) = delete;
  Connection &operator=(const Connection &) = delete;

  // What becomes of it: the next stage goes on at once, or after all others had
  // their turn; or nothing can be done before there is news; or it is over.
  enum class Step { again, soon, wait, end };

  // Does all that can be done without waiting. Never returns `again`.
  Step go_on();
  // When to go on even without news.
  Clock::time_point deadline() const { return deadline_; }
  // Whether Loop::tell() is for it: it waits for the target to be up, or can be
  // asked to leave.
  bool is_to_be_told() const {
    return stage_ == Stage::waiting || stage_ == Stage::reading;
  }

  // The Loop's.
  std::list<Connection>::iterator self;
  Clock::time_point scheduled = Clock::time_point::max();

private:
  enum class Stage { reading, waiting, exchanging, answering, lingering };
  // One direction of an exchange: `head` goes out first, then what `framing`
  // lets pass of `block`.
  struct Flow {
    explicit Flow(Block &source) : block(source) {}

    void begin();
    bool pending() const { return sent < head.size() || passed > 0; }
    bool can_push() const { return pending() && to->writable && !stopped; }
    bool finished() const { return framing.done() && !pending(); }
    void pass();
    bool push();

    Block &block;
    Socket *to = nullptr;
    std::string head;
    std::size_t sent = 0;   // of head
    std::size_t passed = 0; // of block
    Framing framing;
    bool moved = false;   // something went out
    bool stopped = false; // `to` takes no more
    bool shut = false;    // `to` was told that there is no more
    bool unframe = false; // pass the content of chunks, not the chunks
  };
  enum class Outcome {
    pending,    // of news
    unfinished, // but others should have their turn
    answered,   // in full
    no_answer,  // not a byte of one; `Flow::moved` tells if the target got any
    bad_answer,
    bad_request, // malformed in the middle of its body
    cut          // one side is gone; nothing more can be said
  };

  void await_request();
  Step read_request();
  Step begin();
  Step ask_for_target();
  Step await_target();
  Step connect();
  bool can_hear() const;
  bool hear();
  bool dial(milliseconds patience);
  Step no_connection();
  Step no_answer();
  Step exchange();
  Outcome pump();
  Outcome read_answer();
  Step send_own_answer();
  Step finish();
  Step linger();
  void let_go();
  void write_request_head(std::string &out) const;
  void write_answer_head(bool keep, std::string &out);
  void write_cors(std::string &out) const;
  void end_invocation();
  bool cacheable() const;
  // Answers with a line of plain text, with a small page for who asked for one,
  // or with `body`. `lines` are further header lines.
  Step say(int status, std::string_view reason, std::string_view lines = {},
           std::string_view body = {}, std::string_view type = {});
  Step say_failure(const Supervisor::Result &result);
  Step say_status();
  bool wants_page() const;
  bool in_chinese() const;

  Loop &loop_;
  Listener &listener_;
  const Options &options_;
  const std::string peer_;
  const bool crowded_; // one too many: it is only told so
  Socket client_;
  Block from_client_, from_target_;
  Stage stage_ = Stage::reading;
  Clock::time_point deadline_{};

  std::size_t seen_ = 0; // of a head that is not complete
  bool in_head_ = false;
  std::string request_text_;
  Head request_, answer_;

  std::optional<Lease> lease_;
  std::unique_ptr<Upstream> upstream_;
  Flow up_{from_client_}, down_{from_target_};
  int attempt_ = 0;
  bool repeatable_ = false;        // the target may get it twice
  bool reused_ = false;            // upstream_ was
  Clock::time_point page_after_{}; // when who waits is shown a page
  bool dialling_ = false;          // it may not be connected yet,
  milliseconds patience_{0};       // and is dialled again after that
  Clock::time_point stalled_at_{}; // when something is done about it
  Clock::time_point linger_until_{};

  bool client_ended_ = false;   // it sends no more,
  Clock::time_point gone_at_{}; // and is then taken to have gone
  bool answering_ = false;      // the final head is composed
  bool interim_ = false;        // a 1xx was passed on
  bool keep_ = false; // the client's connection outlives this exchange
  bool cut_ = false;  // it is to be closed without ceremony
  bool invocation_owed_ = false; // the platform waits to hear of its end
};

} // namespace detail

// A listening socket and the target behind it. The destructor stops both.
// Throws std::invalid_argument with Options::error or for an empty binary.
class Proxy {
public:
  explicit Proxy(Options options) : Proxy(std::move(options), nullptr) {}
  ~Proxy() { stop(); }
  Proxy(const Proxy &) = delete;
  Proxy &operator=(const Proxy &) = delete;

  // Binds and serves until stop(). False if it cannot bind, or accept any more.
  bool listen(const std::string &host, int port);
  // Returns the port, or -1.
  int bind_to_any_port(const std::string &host);
  // Serves until stop(); returns when the last request has finished, or was cut
  // stop_timeout after stop().
  bool listen_after_bind();
  // From any thread; does not wait. A Proxy that was stopped stays so.
  void stop() { listener_.stop(); }
  Status status() const;

private:
  friend int serve(Options, int, const char *const *);
  Proxy(Options options, detail::Vercel *vercel);

  const Options options_;
  const detail::Log log_;
  detail::Supervisor supervisor_;
  detail::Listener listener_;
};

// `defaults`, with what the environment says instead: WARMPROXY_<FIELD>, PORT
// and HOST. Text is taken as it is, also the empty one; WARMPROXY_ARGS is split
// as a shell would, quotes included; times are 500ms, 45s, 10m, 2h or 30d. What
// cannot be read is said in Options::error.
Options options_from_env(Options defaults);

// For main(): listens on Options::host and port until SIGTERM or SIGINT, lets
// running requests finish, stops the target, and returns 0. 1: it could not
// listen; 2: a setting or the binary is no good. A second signal ends it at
// once. On Vercel (VERCEL_IPC_PATH is set) it keeps the runtime's contract.
// Given main()'s arguments, it answers --help and --version.
int serve(Options options, int argc = 0, const char *const *argv = nullptr);

// ----------------------------------------------------------------------------

namespace detail {

/*
 * Text
 */

inline bool same(std::string_view a, std::string_view b) {
  // RFC 9110, section 5.1: names are case-insensitive. ASCII's, no locale's.
  const auto lower = [](char c) {
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  };
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(),
                    [&](char x, char y) { return lower(x) == lower(y); });
}

inline bool starts_with(std::string_view text, std::string_view with) {
  return text.substr(0, with.size()) == with;
}

inline bool starts_with_same(std::string_view text, std::string_view with) {
  return same(text.substr(0, with.size()), with);
}

inline bool ends_with(std::string_view text, std::string_view with) {
  return text.size() >= with.size() &&
         text.substr(text.size() - with.size()) == with;
}

inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

inline std::string_view trim(std::string_view text) {
  const auto begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) { return {}; }
  return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

template <typename... Parts>
void append(std::string &out, const Parts &...parts) {
  (out.append(parts), ...);
}

template <typename... Parts> std::string concat(const Parts &...parts) {
  std::string out;
  append(out, parts...);
  return out;
}

// Calls `each` with every element of a comma-separated list.
template <typename F> void for_each_of(std::string_view list, F each) {
  while (!list.empty()) {
    const auto comma = list.find(',');
    const auto element = trim(list.substr(0, comma));
    if (!element.empty()) { each(element); }
    if (comma == std::string_view::npos) { return; }
    list.remove_prefix(comma + 1);
  }
}

template <typename N> bool to_number(std::string_view text, N &number) {
  N n = 0;
  for (const char c : text) {
    const auto digit = static_cast<N>(c - '0');
    if (c < '0' || c > '9' ||
        n > (std::numeric_limits<N>::max() - digit) / 10) {
      return false;
    }
    n = n * 10 + digit;
  }
  number = n;
  return !text.empty();
}

inline bool is_control(char c) {
  return (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f;
}

inline bool has_control(std::string_view text) {
  return std::any_of(text.begin(), text.end(),
                     [](char c) { return is_control(c); });
}

inline bool is_token(char c) { // RFC 9110, section 5.6.2
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
         (c >= 'A' && c <= 'Z') ||
         (c != '\0' && std::strchr("!#$%&'*+-.^_`|~", c));
}

inline bool is_token(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(),
                                      [](char c) { return is_token(c); });
}

inline void replace_all(std::string &text, std::string_view from,
                        std::string_view to) {
  for (auto at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

template <typename Duration> std::string in_ms(Duration duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f",
                std::chrono::duration<double, std::milli>(duration).count());
  return text;
}

template <typename Duration> std::string in_seconds(Duration duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f",
                std::chrono::duration<double>(duration).count());
  return text;
}

inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      append(out, "\\", std::string(1, c));
    } else if (c < 0x20 || c == 0x7f) { // and, where char is signed, > 0x7f
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x",
                    static_cast<unsigned>(static_cast<unsigned char>(c)));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out += '"';
}

// What others chose, made fit for a line of a log.
inline std::string printable(std::string text) {
  std::replace_if(text.begin(), text.end(), is_control, '?');
  return text;
}

inline void log_to_stderr(std::string_view message) {
  // One write a line, so that threads and the target do not mix theirs.
  const auto line = concat("[warmproxy] ", message, "\n");
  if (::write(STDERR_FILENO, line.data(), line.size()) < 0) {}
}

/*
 * Messages on the wire
 */

inline std::size_t Framing::take(std::string_view bytes, std::string *content) {
  std::size_t taken = 0;
  const auto take_content = [&] {
    const auto n = static_cast<std::size_t>(
        std::min<std::uint64_t>(left_, bytes.size() - taken));
    if (content) { content->append(bytes.substr(taken, n)); }
    left_ -= n;
    taken += n;
  };
  switch (mode_) {
  case Mode::none: break;
  case Mode::length:
    take_content();
    done_ = left_ == 0;
    break;
  case Mode::chunked:
    while (taken < bytes.size() && !done_) {
      if (state_ == State::data) {
        take_content();
        if (left_ == 0) { state_ = State::data_cr; }
        continue;
      }
      state_ = step(bytes[taken]);
      if (state_ == State::malformed) { break; }
      ++taken;
    }
    break;
  case Mode::until_close:
  case Mode::tunnel:
    if (done_) { break; }
    left_ = bytes.size();
    take_content();
    break;
  }
  return taken;
}

// Strictly RFC 9112, section 7.1: what a lenient reader makes of a bare LF or
// of white space here is how requests get smuggled.
inline Framing::State Framing::step(char c) {
  if (++overhead_ > max_head) { return State::malformed; }
  const auto expect = [c](char expected, State next) {
    return c == expected ? next : State::malformed;
  };
  switch (state_) {
  case State::size_first:
    overhead_ = 0;
    left_ = 0;
    [[fallthrough]];
  case State::size: {
    const auto digit = c >= '0' && c <= '9'   ? c - '0'
                       : c >= 'a' && c <= 'f' ? c - 'a' + 10
                       : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                              : -1;
    if (digit >= 0) {
      if (left_ >> 59) { return State::malformed; } // 2^63 is no size
      left_ = left_ * 16 + static_cast<unsigned>(digit);
      return State::size;
    }
    if (state_ == State::size_first) { return State::malformed; }
    return c == ';' ? State::extension : expect('\r', State::size_lf);
  }
  case State::extension:
    if (c == '\r') { return State::size_lf; }
    return is_control(c) ? State::malformed : State::extension;
  case State::size_lf:
    if (c != '\n') { return State::malformed; }
    overhead_ = 0;
    return left_ ? State::data : State::line_first;
  case State::data_cr: return expect('\r', State::data_lf);
  case State::data_lf: return expect('\n', State::size_first);
  case State::line_first:
    if (c == '\r') { return State::last_lf; }
    return is_token(c) ? State::name : State::malformed;
  case State::name:
    if (c == ':') { return State::value; }
    return is_token(c) ? State::name : State::malformed;
  case State::value:
    if (c == '\r') { return State::value_lf; }
    return is_control(c) ? State::malformed : State::value;
  case State::value_lf: return expect('\n', State::line_first);
  case State::last_lf:
    done_ = c == '\n';
    return expect('\n', State::size_first);
  case State::data:
  case State::malformed: break;
  }
  return State::malformed;
}

inline const Field *Head::find(std::string_view name) const {
  for (const auto &field : fields) {
    if (same(field.name, name)) { return &field; }
  }
  return nullptr;
}

inline std::string_view Head::value(std::string_view name) const {
  const auto field = find(name);
  return field ? field->value : std::string_view{};
}

// Whether a field ends at this hop: RFC 9110, section 7.6.1.
inline bool Head::names(std::string_view name) const {
  for (const auto known :
       {"Connection", "Keep-Alive", "Proxy-Connection", "Upgrade", "TE"}) {
    if (same(name, known)) { return true; }
  }
  for (const auto named : hop) {
    if (same(name, named)) { return true; }
  }
  return false;
}

inline std::size_t head_end(std::string_view bytes, std::size_t from) {
  // An empty line may end in a bare LF: it is for the parser to refuse it.
  from = from > 2 ? from - 2 : 0;
  for (auto at = bytes.find('\n', from); at != std::string_view::npos;
       at = bytes.find('\n', at + 1)) {
    const auto rest = bytes.substr(at + 1, 2);
    if (!rest.empty() && rest[0] == '\n') { return at + 2; }
    if (rest == "\r\n") { return at + 3; }
  }
  return 0;
}

// Takes one line off `text`. False if it does not end as it has to: with CRLF,
// or where `lenient` with a bare LF (RFC 9112, section 2.2).
inline bool next_line(std::string_view &text, bool lenient,
                      std::string_view &line) {
  const auto end = text.find('\n');
  if (end == std::string_view::npos) { return false; }
  line = text.substr(0, end);
  text.remove_prefix(end + 1);
  if (!line.empty() && line.back() == '\r') {
    line.remove_suffix(1);
    return true;
  }
  return lenient;
}

// Reads the lines behind the first one: fields, keep-alive, upgrade.
inline Refusal parse_fields(std::string_view text, bool lenient, Head &head) {
  head.fields.clear();
  head.hop.clear();
  bool close = false, stay = false, upgrade = false;
  for (;;) {
    std::string_view line;
    if (!next_line(text, lenient, line)) {
      return {400, "bare LF in the head"};
    }
    if (line.empty()) { break; }
    if (head.fields.size() == max_fields) {
      return {431, "more than 1000 header lines"};
    }
    const auto colon = line.find(':');
    const auto name = line.substr(0, colon);
    if (colon == std::string_view::npos || !is_token(name)) {
      return {400, "malformed header line"}; // a folded one too, and "Name :"
    }
    if (has_control(line)) { return {400, "control character in a header"}; }
    head.fields.push_back({name, trim(line.substr(colon + 1)), line});
    if (same(name, "Connection")) {
      for_each_of(head.fields.back().value, [&](std::string_view option) {
        close |= same(option, "close");
        stay |= same(option, "keep-alive");
        upgrade |= same(option, "upgrade");
        head.hop.push_back(option);
      });
    }
  }
  if (head.hop.size() > max_hop) {
    return {431, "more than 100 connection options"};
  }
  // RFC 9112, section 9.3
  head.keep_alive = !close && (head.minor == 1 || stay);
  // RFC 9110, section 7.8: it is ignored in an HTTP/1.0 request.
  head.upgrade = upgrade && head.minor == 1 && head.find("Upgrade");
  return {};
}

// The body's length as RFC 9112, section 6.3 has it. Of what is ambiguous
// there, only equal lengths in an answer pass.
inline Refusal parse_framing(bool request, Head &head) {
  const Field *coding = nullptr;
  bool has_length = false;
  head.length = 0;
  for (const auto &field : head.fields) {
    if (same(field.name, "Transfer-Encoding")) {
      if (coding) { return {400, "several Transfer-Encoding lines"}; }
      coding = &field;
    } else if (same(field.name, "Content-Length")) {
      std::uint64_t length = 0;
      if (!to_number(field.value, length)) {
        return {400, "malformed Content-Length"};
      }
      if (std::exchange(has_length, true) &&
          (request || length != head.length)) {
        return {400, "several Content-Length lines"};
      }
      head.length = length;
    }
  }
  if (coding) {
    if (head.minor == 0) { return {400, "Transfer-Encoding in HTTP/1.0"}; }
    if (request && has_length) {
      return {400, "both Transfer-Encoding and Content-Length"};
    }
    if (!same(coding->value, "chunked")) {
      bool chunked = false, early = false;
      for_each_of(coding->value, [&](std::string_view element) {
        early |= chunked;
        chunked |= same(element, "chunked");
      });
      return early ? Refusal{400, "chunked is not the last transfer coding"}
                   : Refusal{501, "a Transfer-Encoding other than chunked"};
    }
    head.framing = Framing(Framing::Mode::chunked);
  } else if (has_length) {
    head.framing = Framing(Framing::Mode::length, head.length);
  } else {
    head.framing =
        Framing(request ? Framing::Mode::none : Framing::Mode::until_close);
  }
  return {};
}

inline Refusal parse_request(std::string_view text, Head &head) {
  std::string_view line;
  if (!next_line(text, false, line)) { return {400, "bare LF in the head"}; }
  const auto first = line.find(' '), last = line.rfind(' ');
  if (first == std::string_view::npos || first == last) {
    return {400, "malformed request line"};
  }
  head.method = line.substr(0, first);
  head.target = line.substr(first + 1, last - first - 1);
  const auto version = line.substr(last + 1);
  if (!is_token(head.method)) { return {400, "malformed method"}; }
  if (has_control(head.target) ||
      head.target.find_first_of(" \t#") != std::string_view::npos) {
    return {400, "malformed request target"};
  }
  if (version != "HTTP/1.1" && version != "HTTP/1.0") {
    const bool other = version.size() == 8 && starts_with(version, "HTTP/") &&
                       version[6] == '.';
    return other ? Refusal{505, "an HTTP version other than 1.0 and 1.1"}
                 : Refusal{400, "malformed request line"};
  }
  head.minor = version.back() - '0';

  if (const auto refusal = parse_fields(text, false, head); refusal.status) {
    return refusal;
  }
  // RFC 9112, section 3.2
  const auto hosts = std::count_if(
      head.fields.begin(), head.fields.end(),
      [](const Field &field) { return same(field.name, "Host"); });
  const auto host = head.value("Host");
  if (hosts > 1 || (hosts == 0 && head.minor == 1)) {
    return {400, hosts ? "several Host lines" : "no Host line"};
  }
  const auto malformed = [](std::string_view authority) {
    return authority.find_first_of(" \t,/?#@\\<>\"") != std::string_view::npos;
  };
  if (malformed(host)) { return {400, "malformed Host"}; }
  if (head.method == "CONNECT") { return {501, "CONNECT is not served"}; }

  head.authority = {};
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (same(head.target.substr(0, scheme.size()), scheme)) { // absolute-form
      const auto rest = head.target.substr(scheme.size());
      const auto end = rest.find_first_of("/?");
      head.authority = rest.substr(0, end);
      head.target = end == std::string_view::npos ? "" : rest.substr(end);
      if (head.authority.empty() || malformed(head.authority)) {
        return {400, "malformed request target"};
      }
    }
  }
  const bool asterisk = head.target == "*" && head.method == "OPTIONS";
  if (head.authority.empty() && !asterisk && !starts_with(head.target, "/")) {
    return {400, "malformed request target"};
  }
  return parse_framing(true, head);
}

inline Refusal parse_response(std::string_view text, std::string_view to,
                              Head &head) {
  std::string_view line;
  if (!next_line(text, true, line) || line.size() < 12 ||
      (!starts_with(line, "HTTP/1.1 ") && !starts_with(line, "HTTP/1.0 ")) ||
      !to_number(line.substr(9, 3), head.status) || head.status < 100 ||
      (line.size() > 12 && line[12] != ' ') || has_control(line)) {
    return {502, "malformed status line"};
  }
  head.minor = line[7] - '0';
  head.reason = line.substr(9);
  if (const auto refusal = parse_fields(text, true, head); refusal.status) {
    return {502, refusal.reason};
  }
  // RFC 9112, section 6.3: these have no body, whatever they say. Of the first
  // two kinds not even the framing lines are passed on.
  if (head.status < 200 || head.status == 204) {
    head.framing = Framing(Framing::Mode::none);
    return {};
  }
  const auto refusal = parse_framing(false, head);
  if (refusal.status) { return {502, refusal.reason}; }
  if (to == "HEAD" || head.status == 304) {
    head.framing = Framing(Framing::Mode::none);
  }
  return {};
}

/*
 * Sockets
 */

// Closes all descriptors from `first` on: now, or with execve.
inline void close_from(int first, bool with_exec) {
#if defined(__linux__) && defined(SYS_close_range)
  const unsigned int flags = with_exec ? 4 : 0; // CLOSE_RANGE_CLOEXEC
  if (::syscall(SYS_close_range, first, ~0U, flags) == 0) { return; }
#endif
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  const auto last = static_cast<int>(std::min<rlim_t>(files.rlim_cur, 65536));
  for (int fd = first; fd < last; ++fd) {
    with_exec ? ::fcntl(fd, F_SETFD, FD_CLOEXEC) : ::close(fd);
  }
}

inline bool make_pipe(Descriptor &reading, Descriptor &writing) {
  int ends[2];
  if (::pipe(ends) != 0) { return false; }
  for (const int fd : ends) {
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  }
  reading.reset(ends[0]);
  writing.reset(ends[1]);
  return true;
}

// A pipe to wake a thread that waits for its reading end.
inline bool make_wake_pipe(Descriptor &reading, Descriptor &writing) {
  return make_pipe(reading, writing) &&
         ::fcntl(reading.get(), F_SETFL, O_NONBLOCK) == 0 &&
         ::fcntl(writing.get(), F_SETFL, O_NONBLOCK) == 0;
}

inline void write_wake(const Descriptor &writing) {
  if (::write(writing.get(), "", 1) < 0) {} // full: it is awake
}

inline void read_wakes(const Descriptor &reading) {
  char bytes[64];
  while (::read(reading.get(), bytes, sizeof(bytes)) > 0) {}
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

// What poll(2) and its like take: milliseconds, never too few; -1 for ever.
inline int milliseconds_to(Clock::time_point until) {
  if (until == Clock::time_point::max()) { return -1; }
  const auto left = std::chrono::ceil<milliseconds>(until - Clock::now());
  return static_cast<int>(std::clamp<std::int64_t>(
      left.count(), 0, std::numeric_limits<int>::max()));
}

// Waits until one of `fds` is ready or `until` has come.
template <std::size_t N>
bool wait_for(pollfd (&fds)[N], Clock::time_point until) {
#ifdef __linux__ // readiness is looked for every 250 us, poll(2) counts in ms
  using std::chrono::nanoseconds;
  const auto left = std::max(nanoseconds(0), nanoseconds(until - Clock::now()));
  const timespec time{static_cast<time_t>(left.count() / 1000000000),
                      static_cast<long>(left.count() % 1000000000)};
  return ::ppoll(fds, N, until == Clock::time_point::max() ? nullptr : &time,
                 nullptr) > 0;
#else
  return ::poll(fds, N, milliseconds_to(until)) > 0;
#endif
}

#ifdef __linux__
inline Poller::Poller() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (!epoll_) {
    throw std::system_error(errno, std::generic_category(), "epoll_create1");
  }
}

inline bool Poller::add(Socket &socket) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.ptr = &socket;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket.fd.get(), &event) == 0;
}

// Has to be said although it will be closed: a child that was just forked can
// hold it open until execve(2), and it would go on to be told of.
inline void Poller::remove(Socket &socket) {
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, socket.fd.get(), nullptr);
  std::replace(news_.begin(), news_.end(), &socket,
               static_cast<Socket *>(nullptr));
}

inline void Poller::wait(Clock::time_point until) {
  epoll_event events[256];
  const int n = ::epoll_wait(epoll_.get(), events, 256, milliseconds_to(until));
  news_.clear();
  next_ = 0;
  for (int i = 0; i < n; ++i) {
    const auto what = events[i].events;
    auto &socket = *static_cast<Socket *>(events[i].data.ptr);
    socket.broken |= (what & (EPOLLHUP | EPOLLERR)) != 0;
    // A recv(2) stops short of urgent data, too.
    socket.ended |= socket.broken || (what & (EPOLLRDHUP | EPOLLPRI));
    socket.readable |= socket.ended || (what & EPOLLIN);
    socket.writable |= socket.broken || (what & EPOLLOUT);
    news_.push_back(&socket);
  }
}
#else
inline Poller::Poller() = default;

inline bool Poller::add(Socket &socket) {
  sockets_.push_back(&socket);
  return true;
}

inline void Poller::remove(Socket &socket) {
  sockets_.erase(std::remove(sockets_.begin(), sockets_.end(), &socket),
                 sockets_.end());
  std::replace(news_.begin(), news_.end(), &socket,
               static_cast<Socket *>(nullptr));
}

inline void Poller::wait(Clock::time_point until) {
  std::vector<pollfd> fds;
  for (const auto socket : sockets_) {
    fds.push_back({socket->fd.get(),
                   static_cast<short>((socket->readable ? 0 : POLLIN) |
                                      (socket->writable ? 0 : POLLOUT)),
                   0});
    // It would be told of again and again. Before that, of a reset.
    if (!fds.back().events && socket->ended) { fds.back().fd = -1; }
  }
  news_.clear();
  next_ = 0;
  const int n = ::poll(fds.data(), static_cast<nfds_t>(fds.size()),
                       milliseconds_to(until));
  if (n < 0 && errno != EINTR) { ::poll(nullptr, 0, 10); } // never spin
  if (n <= 0) { return; }
  for (std::size_t i = 0; i < fds.size(); ++i) {
    const auto what = fds[i].revents;
    auto &socket = *sockets_[i];
    if (!what) { continue; }
    socket.broken |= (what & (POLLERR | POLLNVAL)) != 0;
    socket.ended |= socket.broken || (what & POLLHUP);
    socket.readable |= socket.ended || (what & POLLIN);
    socket.writable |= socket.broken || (what & POLLOUT);
    news_.push_back(&socket);
  }
}
#endif

inline Socket *Poller::next() {
  while (next_ < news_.size()) {
    if (const auto socket = news_[next_++]) { return socket; }
  }
  return nullptr;
}

inline Pages::~Pages() {
  for (const auto page : spare_) {
    ::munmap(page, max_head);
  }
}

inline char *Pages::take() {
  if (!spare_.empty()) {
    const auto page = spare_.back();
    spare_.pop_back();
    return page;
  }
  const auto memory = ::mmap(nullptr, max_head, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) { throw std::bad_alloc(); }
  return static_cast<char *>(memory);
}

inline void Pages::give(char *page) {
  if (spare_.size() < 16) {
    spare_.push_back(page);
  } else {
    ::munmap(page, max_head);
  }
}

inline void Block::consume(std::size_t n) {
  begin_ += n;
  if (begin_ == end_) { clear(); }
}

inline void Block::clear() {
  begin_ = end_ = 0;
  if (data_) { pages_.give(std::exchange(data_, nullptr)); }
}

inline ssize_t Block::receive(int fd, bool &more) {
  if (!data_) { data_ = pages_.take(); }
  if (end_ == max_head) {
    std::memmove(data_, data_ + begin_, end_ - begin_);
    end_ -= std::exchange(begin_, 0);
  }
  const auto room = std::min(max_portion, max_head - end_);
  const auto n = ::recv(fd, data_ + end_, room, MSG_DONTWAIT);
  const int error = errno;
  const auto got = n > 0 ? static_cast<std::size_t>(n) : 0;
  end_ += got;
  more = n == 0 || got == room; // else that was all
  if (empty()) { clear(); }
  errno = error;
  return n;
}

inline ssize_t receive(Socket &from, Block &to) {
  const auto n = to.receive(from.fd.get(), from.readable);
  // Behind those bytes there is an end, of which there is no further news.
  from.readable |= n > 0 && from.ended;
  return n;
}

// Whether a kept connection has neither been closed nor said a word.
inline bool is_silent(int fd) {
  char byte = 0;
  return ::recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 &&
         would_block(errno);
}

struct Address {
  Address(bool ipv6, int port) {
    if (ipv6) {
      auto &in6 = reinterpret_cast<sockaddr_in6 &>(storage);
      in6.sin6_family = AF_INET6;
      in6.sin6_addr = in6addr_loopback;
      in6.sin6_port = htons(static_cast<std::uint16_t>(port));
      size = sizeof(in6);
    } else {
      auto &in = reinterpret_cast<sockaddr_in &>(storage);
      in.sin_family = AF_INET;
      in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      in.sin_port = htons(static_cast<std::uint16_t>(port));
      size = sizeof(in);
    }
  }
  sockaddr *get() { return reinterpret_cast<sockaddr *>(&storage); }

  sockaddr_storage storage{};
  socklen_t size;
};

inline Descriptor new_socket(int family) {
#ifdef SOCK_CLOEXEC
  return Descriptor(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
#else
  Descriptor fd(::socket(family, SOCK_STREAM, 0));
  if (fd) { ::fcntl(fd.get(), F_SETFD, FD_CLOEXEC); }
  return fd;
#endif
}

// A connection to the target, or none and errno. With `patience` it is tried
// for so long; without, it may not be there yet.
inline Descriptor connect_to_target(bool ipv6, int port,
                                    milliseconds patience) {
  auto fd = new_socket(ipv6 ? AF_INET6 : AF_INET);
  if (!fd) { return fd; }
  set_option(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  if (patience.count()) {
    timeval time{};
    time.tv_sec = static_cast<decltype(time.tv_sec)>(patience.count() / 1000);
    time.tv_usec =
        static_cast<decltype(time.tv_usec)>(patience.count() % 1000 * 1000);
    ::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time));
  } else {
    ::fcntl(fd.get(), F_SETFL, O_NONBLOCK);
  }
  Address address(ipv6, port), self(ipv6, 0);
  if (::connect(fd.get(), address.get(), address.size) != 0) {
    if (errno == EINPROGRESS && patience.count()) { errno = ETIMEDOUT; }
    if (errno != EINPROGRESS) { return {}; }
  }
  // A connect to a port in the ephemeral range where nobody listens can be
  // given that very port as its own, and then has met itself. Reset, or the
  // port would stay taken for a minute.
  ::getsockname(fd.get(), self.get(), &self.size);
  if (std::memcmp(&self.storage, &address.storage, address.size) == 0) {
    reset_on_close(fd.get());
    fd.reset();
    errno = ECONNREFUSED;
  }
  return fd;
}

inline int free_port() {
  for (const bool ipv6 : {false, true}) {
    Address address(ipv6, 0);
    const auto fd = new_socket(ipv6 ? AF_INET6 : AF_INET);
    if (fd && ::bind(fd.get(), address.get(), address.size) == 0 &&
        ::getsockname(fd.get(), address.get(), &address.size) == 0) {
      // The port is at the same place in both.
      return ntohs(reinterpret_cast<sockaddr_in &>(address.storage).sin_port);
    }
  }
  return 0;
}

/*
 * Listener
 */

inline std::string normal_prefix(std::string prefix) {
  while (!prefix.empty() && prefix.back() == '/') {
    prefix.pop_back();
  }
  return prefix.empty() || prefix[0] == '/' ? prefix : "/" + prefix;
}

inline Listener::Listener(const warmproxy::Options &o, const Log &l,
                          Supervisor &s, Vercel *v)
    : options(o), log(l), supervisor(s), vercel(v),
      strip_prefix(normal_prefix(o.strip_prefix)) {
  // Not httplib's default, SO_REUSEPORT: a second one of us on the same port
  // would take half the connections and never be noticed.
  set_socket_options(
      [](socket_t fd) { set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1); });
  const auto cores = std::thread::hardware_concurrency();
  for (unsigned i = 0; i < std::clamp(cores, 1U, max_loops); ++i) {
    loops_.push_back(std::make_unique<Loop>(*this));
  }
  supervisor.on_change([this] { tell_all(); });
}

inline Listener::~Listener() { supervisor.on_change({}); }

inline int Listener::bind(const std::string &host, int port) {
  if (!port) {
    port = bind_to_any_port(host);
  } else if (!bind_to_port(host, port)) {
    port = -1;
  }
  if (port < 0) { return port; }
  listening_.fd.reset(svr_sock_.exchange(INVALID_SOCKET));
  const int fd = listening_.fd.get();
  ::fcntl(fd, F_SETFL, O_NONBLOCK);
  // httplib's backlog is 5 in old releases: the sixth of many first requests at
  // once would have to wait a second for its next SYN.
  ::listen(fd, SOMAXCONN);
  // What is set here, accepted connections inherit (on Linux).
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1); // finds clients that died
#ifdef __linux__
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 60);
#endif
  return port;
}

inline bool Listener::run() {
  if (!listening_.fd) { return false; }
  auto &first = *loops_.front();
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  try {
    while (running_ < loops_.size()) {
      threads.emplace_back([&over, &loop = *loops_[running_]] {
        while (!over) {
          loop.turn(Clock::time_point::max());
        }
      });
      ++running_;
    }
  } catch (const std::system_error &) {} // no more threads: fewer will do

  bool good = first.watch(listening_);
  while (good && !draining_) {
    first.turn(listening_.readable && !waiting_for_room_
                   ? paused_until_
                   : Clock::time_point::max());
    good = accept();
  }
  // Who has connected by now is served, who connects from now on is refused.
  listening_.readable = good;
  while (listening_.readable && first.now() >= paused_until_ &&
         !waiting_for_room_ && accept()) {}
  first.forget(listening_);
  listening_.fd.reset();
  draining_ = true;
  tell_all();
  const auto until = Clock::now() + options.stop_timeout;
  while (const auto count = connections()) {
    if (Clock::now() >= until && !cutting_) {
      log(concat("cut ", std::to_string(count),
                 " connections that did not end in ",
                 in_seconds(options.stop_timeout), " s"));
      cutting_ = true;
      tell_all();
    }
    first.turn(cutting_ ? Clock::time_point::max() : until);
  }
  over = true;
  tell_all();
  for (auto &thread : threads) {
    thread.join();
  }
  supervisor.quit();
  return good;
}

inline void Listener::stop() {
  draining_ = true;
  tell_all();
}

inline void Listener::tell_all(bool let_kept_go) {
  for (const auto &loop : loops_) {
    loop->tell(let_kept_go);
  }
}

inline void Listener::left() {
  if (waiting_for_room_ || draining_) { loops_.front()->wake(); }
}

inline std::size_t Listener::connections() const {
  std::size_t count = 0;
  for (const auto &loop : loops_) {
    count += loop->size();
  }
  return count;
}

// Two descriptors a connection, and some for the rest of us: for each Loop
// three and those of `spare_upstreams`, for the Supervisor about ten.
inline std::size_t Listener::capacity() const {
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) != 0) {
    return options.max_connections;
  }
  const auto room = files.rlim_cur > 64 ? (files.rlim_cur - 48) / 2 : 8;
  return static_cast<std::size_t>(
      std::min<rlim_t>(room, options.max_connections));
}

inline std::string address_text(const sockaddr_storage &peer) {
  char text[INET6_ADDRSTRLEN] = "";
  if (peer.ss_family == AF_INET6) {
    const auto &in6 = reinterpret_cast<const sockaddr_in6 &>(peer);
    ::inet_ntop(AF_INET6, &in6.sin6_addr, text, sizeof(text));
  } else {
    const auto &in = reinterpret_cast<const sockaddr_in &>(peer);
    ::inet_ntop(AF_INET, &in.sin_addr, text, sizeof(text));
  }
  const std::string_view mapped = "::ffff:"; // IPv4 on a dual-stack socket
  return starts_with(text, mapped) && contains(text, ".") ? text + mapped.size()
                                                          : text;
}

// Takes what has come, and hands it to the Loop that has least to do. False if
// nothing can be accepted any more.
inline bool Listener::accept() {
  const auto now = loops_.front()->now();
  for (int i = 0; i < 64 && listening_.readable && now >= paused_until_; ++i) {
    // Beyond the limit there is room for a few, to be told 503; when that is
    // taken too, the rest wait in the backlog.
    waiting_for_room_ = true; // before we count, or who leaves would not tell
    if (connections() >= capacity() + 16) { break; }
    waiting_for_room_ = false;
    sockaddr_storage peer{};
    socklen_t size = sizeof(peer);
    const auto address = reinterpret_cast<sockaddr *>(&peer);
#ifdef SOCK_CLOEXEC
    Descriptor client(
        ::accept4(listening_.fd.get(), address, &size, SOCK_CLOEXEC));
#else
    Descriptor client(::accept(listening_.fd.get(), address, &size));
#endif
    if (client) {
      const auto count = connections();
      const bool crowded = count >= capacity();
      if (crowded && now >= complain_at_) {
        complain_at_ = now + std::chrono::seconds(10);
        log(concat("more than ", std::to_string(count),
                   " connections: further ones are answered 503"));
      }
      const auto end = loops_.begin() + static_cast<std::ptrdiff_t>(running_);
      const auto least = std::min_element(
          loops_.begin(), end,
          [](const auto &a, const auto &b) { return a->size() < b->size(); });
      (*least)->adopt(std::move(client), address_text(peer), crowded);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      listening_.readable = false;
    } else if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK) {
      return false;
    } else if (errno != EINTR && errno != ECONNABORTED) {
      // Out of descriptors or memory (EMFILE, ENFILE, ENOBUFS, ENOMEM): the end
      // of a connection is what can help.
      paused_until_ = now + milliseconds(100);
    }
  }
  return true;
}

/*
 * Loop
 */

inline Loop::Loop(Listener &l) : listener(l) {
  if (!make_wake_pipe(woken_.fd, wake_) || !poller_.add(woken_)) {
    throw std::system_error(errno, std::generic_category(), "pipe");
  }
}

inline Loop::~Loop() = default; // where Connection is complete

inline void Loop::adopt(Descriptor client, std::string peer, bool crowded) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    arrivals_.push_back({std::move(client), std::move(peer), crowded});
    ++size_;
  }
  wake();
}

inline void Loop::tell(bool let_kept_go) {
  if (let_kept_go) { let_kept_go_ = true; }
  told_ = true;
  wake();
}

inline void Loop::wake() { write_wake(wake_); }

inline void Loop::turn(Clock::time_point until) {
  if (!timers_.empty()) { until = std::min(until, timers_.begin()->first); }
  if (!kept_.empty()) {
    until = std::min(until, kept_.front()->since + kept_limit);
  }
  poller_.wait(until);
  now_ = Clock::now();

  bool woken = false;
  while (const auto socket = poller_.next()) {
    if (socket->user) {
      go_on(*socket->user);
    } else if (socket == &woken_) {
      woken = true;
    } else {
      look_at_kept(*socket);
    }
  }
  if (woken) {
    read_wakes(woken_.fd);
    woken_.readable = false;
    greet();
    if (told_.exchange(false)) { attend(); }
  }
  while (!timers_.empty() && timers_.begin()->first <= now_) {
    auto &connection = *timers_.begin()->second;
    timers_.erase(timers_.begin());
    connection.scheduled = Clock::time_point::max();
    go_on(connection);
  }
  while (!kept_.empty() && now_ - kept_.front()->since >= kept_limit) {
    drop_oldest();
  }
}

// Takes in the connections that were handed over.
inline void Loop::greet() {
  std::vector<Arrival> arrivals;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    arrivals.swap(arrivals_);
  }
  for (auto &arrival : arrivals) {
    try {
      connections_.emplace_back(*this, std::move(arrival.client),
                                std::move(arrival.peer), arrival.crowded);
    } catch (const std::exception &error) { // no memory, or no watch
      listener.log(concat("cannot serve a connection: ", error.what()));
      --size_;
      listener.left();
      continue;
    }
    connections_.back().self = std::prev(connections_.end());
    schedule(connections_.back(), connections_.back().deadline());
  }
}

inline void Loop::attend() {
  for (auto next = connections_.begin(); next != connections_.end();) {
    auto &connection = *next++;
    if (listener.cutting()) {
      end(connection);
    } else if (connection.is_to_be_told()) {
      go_on(connection);
    }
  }
  // A target that is to end may wait for its connections to do so first.
  const bool all = let_kept_go_.exchange(false);
  while (!kept_.empty() &&
         (all || !listener.supervisor.is_up(kept_.front()->generation))) {
    drop_oldest();
  }
}

inline void Loop::go_on(Connection &connection) {
  auto step = Connection::Step::end;
  try {
    step = connection.go_on();
  } catch (const std::exception &error) { // no memory
    listener.log(concat("a connection was cut: ", error.what()));
  }
  switch (step) {
  case Connection::Step::end: return end(connection);
  case Connection::Step::soon: return schedule(connection, now_);
  default: return schedule(connection, connection.deadline());
  }
}

// Sees to it that it goes on then, or sooner. When the time comes, who has a
// later one by now is scheduled anew: so a deadline that is put off with every
// request costs nothing.
inline void Loop::schedule(Connection &connection, Clock::time_point when) {
  when = std::max(when, now_ + std::chrono::nanoseconds(1)); // the next turn
  if (when >= connection.scheduled) { return; }
  timers_.erase({connection.scheduled, &connection});
  connection.scheduled = when;
  timers_.insert({when, &connection});
}

inline void Loop::end(Connection &connection) {
  timers_.erase({connection.scheduled, &connection});
  connections_.erase(connection.self);
  --size_;
  limit_kept();
  listener.left();
}

inline std::unique_ptr<Upstream> Loop::take(std::uint64_t generation,
                                            milliseconds oldest, bool care) {
  // The last one kept is the one least likely to have been closed.
  while (!kept_.empty() && now_ - kept_.back()->since < oldest) {
    auto upstream = std::move(kept_.back());
    kept_.pop_back();
    // What a target says unasked on an idle connection, a 408 as it closes it,
    // is nobody's answer. It has no time for that between two requests that
    // follow each other closely; to look every time is a fifth of the system
    // calls of a request.
    const bool fresh = now_ - upstream->since < milliseconds(20);
    if (upstream->generation == generation && !upstream->ended &&
        ((fresh && !care && !upstream->readable) ||
         is_silent(upstream->fd.get()))) {
      return upstream;
    }
    drop(std::move(upstream));
  }
  if (!kept_.empty()) { drop_oldest(); } // it is replaced by a new one
  return {};
}

inline std::unique_ptr<Upstream> Loop::open(Descriptor fd,
                                            std::uint64_t generation) {
  auto upstream = std::make_unique<Upstream>();
  upstream->fd = std::move(fd);
  upstream->generation = generation;
  if (!poller_.add(*upstream)) { return {}; }
  ++upstreams_;
  limit_kept();
  return upstream;
}

inline void Loop::keep(std::unique_ptr<Upstream> upstream) {
  upstream->user = nullptr;
  upstream->since = now_;
  kept_.push_back(std::move(upstream));
}

inline void Loop::drop(std::unique_ptr<Upstream> upstream) {
  poller_.remove(*upstream);
  --upstreams_;
}

inline void Loop::drop_oldest() {
  drop(std::move(kept_.front()));
  kept_.erase(kept_.begin());
}

inline void Loop::limit_kept() {
  while (!kept_.empty() && upstreams_ > size_ + spare_upstreams) {
    drop_oldest();
  }
}

// What the target says, or does, about a connection that nobody uses.
inline void Loop::look_at_kept(const Socket &socket) {
  const auto kept = std::find_if(
      kept_.begin(), kept_.end(),
      [&](const std::unique_ptr<Upstream> &k) { return k.get() == &socket; });
  if (kept == kept_.end() || is_silent(socket.fd.get())) { return; }
  drop(std::move(*kept));
  kept_.erase(kept);
}

/*
 * Connection: a request comes in
 */

inline Connection::Connection(Loop &loop, Descriptor client, std::string peer,
                              bool crowded)
    : loop_(loop), listener_(loop.listener), options_(listener_.options),
      peer_(std::move(peer)), crowded_(crowded), from_client_(loop.pages),
      from_target_(loop.pages) {
  client_.fd = std::move(client);
  client_.user = this;
  if (!loop_.watch(client_)) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
  await_request();
}

inline Connection::~Connection() {
  // In the middle of an exchange a close would look like the end of what only
  // ends so.
  if (stage_ == Stage::exchanging && answering_ &&
      (down_.unframe || down_.framing.mode() >= Framing::Mode::until_close)) {
    reset_on_close(client_.fd.get());
  }
  let_go();
  end_invocation();
  loop_.forget(client_);
}

inline Connection::Step Connection::go_on() {
  for (;;) {
    const auto step = [this] {
      switch (stage_) {
      case Stage::reading: return read_request();
      case Stage::waiting: return await_target();
      case Stage::exchanging: return exchange();
      case Stage::answering: return send_own_answer();
      case Stage::lingering: break;
      }
      return linger();
    }();
    if (step != Step::again) { return step; }
  }
}

inline void Connection::await_request() {
  if (request_text_.capacity() > 4096) { // what a large head took
    request_text_ = {};
    request_ = answer_ = {};
  }
  stage_ = Stage::reading;
  seen_ = 0;
  in_head_ = false;
  deadline_ = loop_.now() + (crowded_ ? std::chrono::seconds(2) : idle_limit);
}

// Reads one head into request_.
inline Connection::Step Connection::read_request() {
  const auto refuse = [this](int status, std::string_view reason) {
    request_ = {};
    return say(status, reason);
  };
  std::size_t end = 0;
  for (int i = 0;; ++i) {
    if (i == portions_a_turn) { return Step::soon; }
    // RFC 9112, section 2.2: empty lines before a request are skipped.
    while (starts_with(from_client_.view(), "\r\n")) {
      from_client_.consume(2);
    }
    end = head_end(from_client_.view(), seen_);
    if (end) { break; }
    seen_ = from_client_.view().size();
    if (from_client_.full()) {
      return refuse(431, "the request's head is larger than 64 KB");
    }
    if (!from_client_.empty() && !std::exchange(in_head_, true)) {
      deadline_ = loop_.now() + head_limit;
    }
    if (loop_.now() >= deadline_) {
      return in_head_ ? refuse(408, "the request's head took longer than 30 s")
                      : Step::end;
    }
    // Who is idle is let go when we are to end, but not with a request that is
    // here already.
    const bool leaving = from_client_.empty() && listener_.draining();
    if (!client_.readable && !leaving) { return Step::wait; }
    const auto n = receive(client_, from_client_);
    if (n < 0 && would_block(errno)) {
      return leaving ? Step::end : Step::wait;
    }
    if (n <= 0) { return Step::end; }
  }
  // Kept, because the block is filled anew while the answer is awaited.
  request_text_.assign(from_client_.view().substr(0, end));
  from_client_.consume(end);
  const auto refusal = parse_request(request_text_, request_);
  if (refusal.status) { return refuse(refusal.status, refusal.reason); }
  invocation_owed_ = listener_.vercel != nullptr;
  if (crowded_) {
    request_.keep_alive = false;
    return say(503, "too many connections", "Retry-After: 1\r\n");
  }
  return begin();
}

// A request was read: it is answered here, or handed to the target.
inline Connection::Step Connection::begin() {
  answering_ = interim_ = keep_ = cut_ = client_ended_ = false;
  gone_at_ = Clock::time_point::max();
  const auto path = request_.target.substr(0, request_.target.find('?'));
  if (listener_.vercel && path == "/_vercel/ping") {
    invocation_owed_ = false;
    return say(200, {}, {}, "OK", "text/plain; charset=utf-8");
  }
  if (!options_.status_path.empty() && path == options_.status_path) {
    return say_status();
  }
  if (!options_.cors_origins.empty() && request_.method == "OPTIONS" &&
      request_.find("Origin") &&
      request_.find("Access-Control-Request-Method")) {
    return say(204, {}); // with the allow headers
  }
  // What is already here of a body can be known to be malformed before anybody
  // is troubled with it.
  auto body = request_.framing;
  body.take(from_client_.view());
  if (body.malformed()) { return say(400, "malformed chunk"); }
  // RFC 9110, section 9.2.2: what may be sent again is what changes nothing.
  repeatable_ = request_.framing.mode() == Framing::Mode::none &&
                (request_.method == "GET" || request_.method == "HEAD" ||
                 request_.method == "OPTIONS");
  const bool page = options_.waiting_page_after.count() > 0 && wants_page();
  page_after_ = page ? loop_.now() + options_.waiting_page_after
                     : Clock::time_point::max();
  attempt_ = 0;
  return ask_for_target();
}

inline Connection::Step Connection::ask_for_target() {
  ++attempt_;
  let_go();
  lease_.emplace();
  stage_ = Stage::waiting;
  return Step::again;
}

inline Connection::Step Connection::await_target() {
  if (loop_.now() >= gone_at_ || (can_hear() ? !hear() : client_.broken)) {
    cut_ = true;
    return finish();
  }
  const auto result = listener_.supervisor.acquire(*lease_, page_after_);
  deadline_ = std::min(page_after_, gone_at_);
  if (result.pending) { return Step::wait; }
  if (result.status) { return say_failure(result); }
  if (request_.find("Warmproxy-Wait")) { // the script of the waiting page
    return say(204, {}, lease_->timing());
  }
  return connect();
}

inline bool Connection::can_hear() const {
  return client_.readable && !client_ended_ && !from_client_.full();
}

// Takes what the client sends on: a body, the next request, or a farewell.
// False if it has gone.
inline bool Connection::hear() {
  const auto n = receive(client_, from_client_);
  if (n == 0) {
    client_ended_ = true;
    gone_at_ = loop_.now() + farewell_limit;
  }
  return n >= 0 || would_block(errno);
}

// Gets a connection to the target, and the request ready for it.
inline Connection::Step Connection::connect() {
  up_.begin();
  down_.begin();
  down_.to = &client_;
  // One kept for long may be closing just now, which is the target's right.
  const auto oldest = attempt_ > 1  ? milliseconds(0)
                      : repeatable_ ? milliseconds(kept_limit)
                                    : fresh_limit;
  upstream_ = loop_.take(lease_->generation, oldest, !repeatable_);
  if (!upstream_ && lease_->proof && is_silent(lease_->proof.get())) {
    upstream_ = loop_.open(std::move(lease_->proof), lease_->generation);
  }
  reused_ = upstream_ != nullptr;
  dialling_ = false;
  stalled_at_ = Clock::time_point::max();
  if (!upstream_ && !dial(milliseconds(20))) { return no_connection(); }
  upstream_->user = this;
  up_.to = upstream_.get();
  write_request_head(up_.head);
  up_.framing = request_.framing;
  up_.pass();
  from_target_.clear();
  if (up_.framing.malformed()) { return say(400, "malformed chunk"); }
  stage_ = Stage::exchanging;
  return Step::again;
}

// A loopback connect that takes longer than `patience` has met a full backlog,
// and the kernel would try again after 1 s, 3 s, 7 s: dialling anew gets in as
// soon as there is room, which 200 first requests at once need.
inline bool Connection::dial(milliseconds patience) {
  auto fd = connect_to_target(lease_->ipv6, lease_->port, milliseconds(0));
  if (!fd) { return false; }
  upstream_ = loop_.open(std::move(fd), lease_->generation);
  if (!upstream_) { return false; }
  upstream_->user = this;
#ifndef __linux__ // where a loopback connect is done by now, if there is room
  upstream_->writable = false;
#endif
  up_.to = upstream_.get();
  dialling_ = true;
  patience_ = patience;
  stalled_at_ = loop_.now() + patience;
  return true;
}

// errno says why.
inline Connection::Step Connection::no_connection() {
  if (errno == ECONNREFUSED || errno == ETIMEDOUT) { return no_answer(); }
  // It is us who lack something: descriptors, ports, memory.
  listener_.tell_all(true);
  return say(503, concat("no connection to the target: ", std::strerror(errno)),
             "Retry-After: 1\r\n");
}

// The target did not say a word.
inline Connection::Step Connection::no_answer() {
  if ((up_.moved && !repeatable_) || attempt_ == max_attempts) {
    return say(502, "the target closed the connection without an answer");
  }
  // A kept connection that has gone stale tells nothing about the target.
  if (!reused_) { listener_.supervisor.suspect(*lease_); }
  return ask_for_target();
}

// Lets go of the target.
inline void Connection::let_go() {
  if (upstream_) { loop_.drop(std::move(upstream_)); }
  lease_.reset();
}

// The request was answered, or never will be.
inline Connection::Step Connection::finish() {
  let_go();
  end_invocation();
  if (cut_) { return Step::end; }
  if (keep_) {
    await_request();
    return from_client_.empty() ? Step::again : Step::soon;
  }
  // Closing a socket with unread bytes resets it, and a reset overtakes the
  // answer: so the client is let finish (RFC 9112, section 9.6).
  ::shutdown(client_.fd.get(), SHUT_WR);
  stage_ = Stage::lingering;
  linger_until_ = loop_.now() + std::chrono::seconds(30);
  deadline_ = loop_.now() + std::chrono::seconds(2);
  return Step::again;
}

inline Connection::Step Connection::linger() {
  for (int i = 0; i < portions_a_turn; ++i) {
    const bool over = loop_.now() >= deadline_ && !client_.readable;
    if (over || loop_.now() >= linger_until_) { return Step::end; }
    if (!client_.readable) { return Step::wait; }
    from_client_.clear();
    const auto n = receive(client_, from_client_);
    if (n == 0 || (n < 0 && !would_block(errno))) { return Step::end; }
    if (n > 0) { deadline_ = loop_.now() + std::chrono::seconds(2); }
  }
  return Step::soon;
}

// Tells the platform that the request has come to its end, once.
inline void Connection::end_invocation() {
  if (!std::exchange(invocation_owed_, false)) { return; }
  const auto id = request_.value("x-vercel-internal-invocation-id");
  if (!id.empty()) {
    listener_.vercel->end(id, request_.value("x-vercel-internal-request-id"));
  }
}

/*
 * Connection: the exchange
 */

inline void Connection::Flow::begin() {
  head.clear();
  sent = passed = 0;
  framing = {};
  moved = stopped = shut = unframe = false;
}

// Lets pass what the block holds of this message.
inline void Connection::Flow::pass() {
  if (unframe) {
    block.consume(framing.take(block.view(), &head));
  } else {
    passed += framing.take(block.view().substr(passed));
  }
}

// Sends what was let pass. False if the other side takes no more.
inline bool Connection::Flow::push() {
  const auto body = block.view();
  iovec parts[] = {{head.data() + sent, head.size() - sent},
                   {const_cast<char *>(body.data()), passed}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  const auto n = ::sendmsg(to->fd.get(), &message, MSG_DONTWAIT);
  if (n < 0) {
    to->writable = errno == EINTR;
    return would_block(errno);
  }
  moved = true;
  auto out = static_cast<std::size_t>(n);
  const auto of_head = std::min(out, head.size() - sent);
  sent += of_head;
  out -= of_head;
  if (sent == head.size()) {
    head.clear();
    sent = 0;
  }
  block.consume(out);
  passed -= out;
  to->writable = !pending(); // or it would have taken all
  return true;
}

inline Connection::Step Connection::exchange() {
  if (loop_.now() >= stalled_at_) {
    stalled_at_ = Clock::time_point::max();
    if (!dialling_) {
      listener_.tell_all(true);
    } else if (!upstream_->writable) {
      loop_.drop(std::move(upstream_));
      errno = ETIMEDOUT;
      if (patience_ > std::chrono::seconds(10) || !dial(patience_ * 2)) {
        return no_connection();
      }
    }
  }
  const auto outcome = pump();
  if (answering_) {
    stalled_at_ = Clock::time_point::max();
  } else if (dialling_ && up_.moved) {
    dialling_ = false;
    stalled_at_ = loop_.now() + stall_limit;
  }
  deadline_ = std::min(stalled_at_, gone_at_);
  switch (outcome) {
  case Outcome::pending: return Step::wait;
  case Outcome::unfinished: return Step::soon;
  case Outcome::no_answer: return no_answer();
  case Outcome::bad_request: return say(400, "malformed chunk");
  case Outcome::bad_answer:
    return say(502, "the target's answer is malformed or incomplete");
  case Outcome::answered:
    if (request_.minor == 1 && up_.finished() && !up_.stopped &&
        answer_.keep_alive && from_target_.empty() && !answer_.upgrade &&
        down_.framing.mode() != Framing::Mode::until_close &&
        !upstream_->ended) {
      loop_.keep(std::move(upstream_));
    }
    return finish();
  case Outcome::cut: break;
  }
  cut_ = true;
  return finish();
}

// Moves bytes in both directions at once, each until its framing is done.
inline Connection::Outcome Connection::pump() {
  auto &target = *upstream_;
  for (int i = 0; i < portions_a_turn; ++i) {
    if (up_.can_push() && !up_.push()) {
      up_.stopped = true; // yet it may have answered before it went
      if (!up_.moved) { return Outcome::no_answer; }
    }
    if (down_.can_push() && !down_.push()) { return Outcome::cut; }
    const bool tunnel = down_.framing.mode() == Framing::Mode::tunnel;
    if (tunnel) {
      if (!down_.pending()) { end_invocation(); } // the 101 is out
      // Both of its ends are closed, and not by us: it was reset.
      if (up_.stopped || (client_.broken && !down_.shut)) {
        return Outcome::cut;
      }
      if (client_ended_) { up_.framing.close(); }
      gone_at_ = Clock::time_point::max();
      for (const auto flow : {&up_, &down_}) { // half-close, each for itself
        // Once: each call is news of the socket itself.
        if (flow->finished() && !std::exchange(flow->shut, true)) {
          ::shutdown(flow->to->fd.get(), SHUT_WR);
        }
      }
      if (up_.finished() && down_.finished()) { return Outcome::answered; }
    } else if (answering_ && down_.finished()) {
      return Outcome::answered;
    }

    bool moved = false;
    if (!up_.pending() && can_hear()) {
      if (!hear()) { return Outcome::cut; }
      moved = true;
      if (!up_.framing.done()) {
        up_.pass();
        if (up_.framing.malformed()) {
          return answering_ ? Outcome::cut : Outcome::bad_request;
        }
      }
    } else if (!tunnel && (client_.broken || loop_.now() >= gone_at_)) {
      return Outcome::cut; // nobody is waiting any more
    }

    if (target.readable && !down_.pending() &&
        !(answering_ && down_.framing.done())) {
      const auto n = receive(target, from_target_);
      moved |= n >= 0;
      if (n < 0 && would_block(errno)) {
        continue;
      } else if (n > 0 && answering_) {
        down_.pass();
      } else if (n > 0) {
        const auto outcome = read_answer();
        if (outcome != Outcome::answered) { return outcome; }
      } else if (!answering_) {
        return from_target_.empty() && !interim_ ? Outcome::no_answer
                                                 : Outcome::bad_answer;
      } else if (n == 0 && (tunnel || down_.framing.mode() ==
                                          Framing::Mode::until_close)) {
        down_.framing.close();
      } else {
        return Outcome::cut; // in the middle of its answer
      }
      if (down_.framing.malformed()) { return Outcome::cut; }
    }
    if (!moved && !up_.can_push() && !down_.can_push()) {
      return Outcome::pending;
    }
  }
  return Outcome::unfinished;
}

// Reads the heads that have come: any 1xx, then the final one, after which
// answering_ is set. `answered` only says that all is well so far.
inline Connection::Outcome Connection::read_answer() {
  while (!answering_) {
    const auto end = head_end(from_target_.view());
    if (!end) {
      return from_target_.full() ? Outcome::bad_answer : Outcome::answered;
    }
    const auto text = from_target_.view().substr(0, end);
    const auto refusal = parse_response(text, request_.method, answer_);
    const bool switching = answer_.status == 101;
    if (refusal.status || (switching && !request_.upgrade)) {
      return Outcome::bad_answer;
    }
    answer_.upgrade = switching;
    if (answer_.status < 200 && !switching) {
      // RFC 9110, section 15.2: an HTTP/1.0 client does not know them.
      if (request_.minor == 1) {
        write_answer_head(true, down_.head);
        interim_ = true;
      }
    } else {
      answering_ = true;
      if (switching) {
        up_.framing = answer_.framing = Framing(Framing::Mode::tunnel);
        up_.pass(); // what the client sent on
      }
      down_.framing = answer_.framing;
      const bool chunked = down_.framing.mode() == Framing::Mode::chunked;
      down_.unframe = chunked && request_.minor == 0;
      keep_ = request_.keep_alive && !switching && !down_.unframe &&
              down_.framing.mode() != Framing::Mode::until_close &&
              up_.finished() && !listener_.draining();
      write_answer_head(keep_, down_.head);
    }
    from_target_.consume(end);
  }
  down_.pass();
  return Outcome::answered;
}

// To CGI and its like, "_" and "-" are the same in a name: what is ours to say
// must not be said by others in that disguise.
inline bool is_disguised(std::string_view name) {
  if (!contains(name, "_")) { return false; }
  std::string plain(name);
  std::replace(plain.begin(), plain.end(), '_', '-');
  return starts_with_same(plain, "X-Forwarded-") ||
         starts_with_same(plain, "x-vercel-internal-");
}

inline void Connection::write_request_head(std::string &out) const {
  const auto platform = listener_.vercel != nullptr;
  const auto &prefix = listener_.strip_prefix;
  auto target = request_.target;
  const bool strip =
      !prefix.empty() && starts_with(target, prefix) &&
      (target.size() == prefix.size() || target[prefix.size()] == '/' ||
       target[prefix.size()] == '?');
  if (strip) { target.remove_prefix(prefix.size()); }

  append(out, request_.method, " ");
  if (!starts_with(target, "/") && target != "*") {
    // RFC 9112, sections 3.2.1 and 3.2.4, for an absolute-form without a path
    out += target.empty() && request_.method == "OPTIONS" && !strip ? '*' : '/';
  }
  append(out, target, request_.minor ? " HTTP/1.1\r\n" : " HTTP/1.0\r\n");
  // RFC 9112, section 3.2.2: in absolute-form, it is the target that counts.
  const bool absolute = !request_.authority.empty();
  const auto host = absolute ? request_.authority : request_.value("Host");
  if (absolute) { append(out, "Host: ", host, "\r\n"); }

  const Field *chain = nullptr; // RFC 7239 knows what it is a chain of
  for (const auto &field : request_.fields) {
    if (same(field.name, "X-Forwarded-For")) { chain = &field; }
  }
  bool trailers = false, proto_known = false, host_known = false;
  for (const auto &field : request_.fields) {
    const auto is = [&field](const char *name) {
      return same(field.name, name);
    };
    if (is("TE")) {
      for_each_of(field.value, [&](std::string_view coding) {
        trailers |= same(coding, "trailers");
      });
    } else if (is("Host")) {
      if (!absolute) { append(out, field.line, "\r\n"); }
    } else if (is("Content-Length")) { // parse_framing() saw to it being one
      append(out, field.name, ": ", std::to_string(request_.length), "\r\n");
    } else if (is("Transfer-Encoding")) {
      append(out, field.name, ": chunked\r\n");
    } else if (is("Upgrade") && request_.upgrade) {
      append(out, field.line, "\r\n");
    } else if (is("X-Forwarded-Proto") || is("X-Forwarded-Host")) {
      if (!platform) { continue; } // anyone could have sent it
      (is("X-Forwarded-Host") ? host_known : proto_known) = true;
      append(out, field.line, "\r\n");
    } else if (&field == chain) {
      append(out, field.line);
      if (!platform) { append(out, ", ", peer_); }
      out += "\r\n";
    } else if (starts_with_same(field.name, "x-vercel-internal-") ||
               is_disguised(field.name) ||
               (is("X-Forwarded-Prefix") && !prefix.empty()) ||
               is("Warmproxy-Wait") || request_.names(field.name)) {
      continue;
    } else {
      append(out, field.line, "\r\n");
    }
  }
  if (!chain) { append(out, "X-Forwarded-For: ", peer_, "\r\n"); }
  if (!proto_known) { out += "X-Forwarded-Proto: http\r\n"; }
  if (!host_known && !host.empty()) {
    append(out, "X-Forwarded-Host: ", host, "\r\n");
  }
  if (strip) { append(out, "X-Forwarded-Prefix: ", prefix, "\r\n"); }
  // RFC 9110, sections 7.8 and 10.1.4: both have to be named.
  if (request_.upgrade || trailers) {
    append(out, trailers ? "TE: trailers\r\n" : "",
           "Connection: ", request_.upgrade ? "Upgrade" : "",
           request_.upgrade && trailers ? ", " : "", trailers ? "TE" : "",
           "\r\n");
  }
  out += "\r\n";
}

inline void Connection::write_answer_head(bool keep, std::string &out) {
  const bool interim = answer_.status < 200;
  // A 426 must say to what (RFC 9110, section 15.5.22), as a 101 does.
  const bool upgrade = answer_.upgrade || answer_.status == 426;
  const bool bodiless = interim || answer_.status == 204;
  const bool chunked = answer_.find("Transfer-Encoding");
  const bool cors = !options_.cors_origins.empty() && !interim;
  const bool cached = !interim && cacheable();
  bool has_length = false;

  append(out, "HTTP/1.1 ", answer_.reason, "\r\n");
  for (const auto &field : answer_.fields) {
    const auto is = [&field](const char *name) {
      return same(field.name, name);
    };
    if (is("Transfer-Encoding")) {
      if (!bodiless && request_.minor == 1) {
        append(out, field.name, ": chunked\r\n");
      }
      continue;
    }
    if (is("Content-Length")) {
      if (!bodiless && !chunked && !std::exchange(has_length, true)) {
        append(out, field.name, ": ", std::to_string(answer_.length), "\r\n");
      }
      continue;
    }
    if (!(is("Upgrade") && upgrade) &&
        (answer_.names(field.name) ||
         (cors && starts_with_same(field.name, "Access-Control-Allow-")) ||
         (cached && (is("Cache-Control") || is("CDN-Cache-Control") ||
                     is("Vercel-CDN-Cache-Control"))))) {
      continue;
    }
    append(out, field.line, "\r\n");
  }
  if (cached) {
    const auto age = std::to_string(options_.cdn_cache.count());
    append(out, "Cache-Control: public, s-maxage=", age, "\r\n");
    append(out, "CDN-Cache-Control: public, max-age=", age, "\r\n");
    append(out, "Vercel-CDN-Cache-Control: public, max-age=", age, "\r\n");
  }
  if (cors) { write_cors(out); }
  if (!interim) { out += lease_->timing(); }
  if (upgrade) {
    append(out, "Connection: ", keep || answer_.upgrade ? "" : "close, ",
           "Upgrade\r\n");
  } else if (!keep) {
    out += "Connection: close\r\n";
  } else if (request_.minor == 0) {
    out += "Connection: keep-alive\r\n";
  }
  out += "\r\n";
}

// Whether `cdn_cache` is for this answer.
inline bool Connection::cacheable() const {
  // A 304 too: what it says replaces what the 200 had said.
  if (options_.cdn_cache.count() == 0 ||
      (answer_.status != 200 && answer_.status != 304) ||
      (request_.method != "GET" && request_.method != "HEAD")) {
    return false;
  }
  for (const auto &field : answer_.fields) {
    bool forbidden = same(field.name, "Set-Cookie");
    if (same(field.name, "Cache-Control")) {
      for_each_of(field.value, [&](std::string_view directive) {
        const auto name = directive.substr(0, directive.find('='));
        forbidden |= same(name, "no-store") || same(name, "private");
      });
    }
    if (forbidden) { return false; }
  }
  const auto path = request_.target.substr(0, request_.target.find('?'));
  const auto content = answer_.value("Content-Type");
  const auto type = trim(content.substr(0, content.find(';')));
  return ends_with(path, ".js") || ends_with(path, ".css") ||
         same(type, "text/javascript") ||
         same(type, "application/javascript") || same(type, "text/css");
}

inline void Connection::write_cors(std::string &out) const {
  // Which headers follow depends on it, also where none do.
  out += "Vary: Origin\r\n";
  const auto origin = request_.value("Origin");
  const auto &origins = options_.cors_origins;
  if (origin.empty() ||
      std::none_of(origins.begin(), origins.end(), [&](const std::string &o) {
        return o == "*" || same(o, origin);
      })) {
    return;
  }
  // Fetch, section 3.2.5: with credentials, `*` is an origin like any other, so
  // the origin itself is named.
  append(out, "Access-Control-Allow-Origin: ", origin,
         "\r\nAccess-Control-Allow-Credentials: true\r\n");
  const auto method = request_.value("Access-Control-Request-Method");
  const auto headers = request_.value("Access-Control-Request-Headers");
  if (!method.empty()) {
    append(out, "Access-Control-Allow-Methods: ", method, "\r\n");
  }
  if (!headers.empty()) {
    append(out, "Access-Control-Allow-Headers: ", headers, "\r\n");
  }
}

/*
 * Connection: what we say ourselves
 */

inline const char *status_text(int status) {
  switch (status) {
  case 200: return "OK";
  case 204: return "No Content";
  case 400: return "Bad Request";
  case 408: return "Request Timeout";
  case 431: return "Request Header Fields Too Large";
  case 501: return "Not Implemented";
  case 502: return "Bad Gateway";
  case 503: return "Service Unavailable";
  case 504: return "Gateway Timeout";
  case 505: return "HTTP Version Not Supported";
  default: return "Error";
  }
}

// The page of someone who waits, and of someone whom we must disappoint. It
// asks for nothing from outside. `%` stands for what fill_page() knows.
inline constexpr std::string_view page_template = R"html(<!doctype html>
<html lang="%lang">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta name="color-scheme" content="light dark">
<title>%title</title>
<link rel="icon" href="data:,">
%refresh<style>
:root { --page: #f6f7f9; --text: #1c2330; --soft: #5d6778; --line: #dde1e8; --warm: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171d; --text: #e9ecf1; --soft: #9aa4b4; --line: #2b313c; --warm: #ff8a4c }
}
* { box-sizing: border-box }
html { height: 100% }
body { margin: 0; min-height: 100%; display: grid; place-items: center; padding: 24px;
  background: var(--page); color: var(--text);
  font: 1.0625rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "PingFang SC", "Noto Sans CJK SC", sans-serif }
main { width: 100%; max-width: 26rem }
h1 { display: flex; align-items: baseline; gap: .45em; margin: 0 0 .35em; font-size: 1.45rem; font-weight: 650; line-height: 1.25; letter-spacing: -.01em }
h1::before { content: ""; flex: none; width: .55em; height: .55em; border-radius: 50%; background: var(--soft) }
.waits h1::before { background: var(--warm); animation: glow 1.6s ease-in-out infinite alternate }
p { margin: 0; color: var(--soft); overflow-wrap: anywhere }
p::first-letter { text-transform: uppercase }
progress { appearance: none; -webkit-appearance: none; display: block; width: 100%; height: 4px; margin: 1.5rem 0 .9rem;
  border: 0; border-radius: 2px; overflow: hidden; background: var(--line) }
progress::-webkit-progress-bar { background: transparent }
progress::-moz-progress-bar { background: transparent }
progress { background-image: linear-gradient(var(--warm), var(--warm)); background-size: 35% 100%;
  background-repeat: no-repeat; animation: go 1.6s ease-in-out infinite alternate }
@keyframes go { from { background-position: 0 0 } to { background-position: 100% 0 } }
@keyframes glow { from { opacity: .35 } to { opacity: 1 } }
@media (prefers-reduced-motion: reduce) {
  progress, .waits h1::before { animation: none }
  progress { background-image: repeating-linear-gradient(90deg, var(--warm) 0 8px, transparent 8px 16px); background-size: auto; opacity: .6 }
}
@media (forced-colors: active) {
  :root { --line: GrayText; --warm: Highlight; --soft: CanvasText }
  progress, h1::before { forced-color-adjust: none }
}
small { color: var(--soft); font-size: .9rem; font-variant-numeric: tabular-nums }
.again { display: inline-block; margin-top: 1.4rem; padding: .6em 1.3em; border: 1px solid transparent; border-radius: 8px;
  background: var(--warm); color: var(--page); font: inherit; font-weight: 600; text-decoration: none; cursor: pointer }
.again:focus-visible { outline: 3px solid var(--text); outline-offset: 2px }
[hidden] { display: none !important }
</style>
</head>
<body>
<main id="main"%waits>
<div role="status" aria-live="polite"><h1 id="title">%title</h1><p id="text">%text</p></div>
%rest</main>
</body>
</html>
)html";

// One request is kept open until the target is up: a function whose instance is
// frozen between requests would not go on starting.
inline constexpr std::string_view waiting_part =
    R"html(<progress id="bar" aria-labelledby="title"></progress>
<small id="time" aria-hidden="true">%time</small>
<button id="again" class="again" type="button" hidden>%again</button>
<script>
(function () {
  var begin = Date.now() - %seconds * 1000, clock, title = document.title, text;
  var by = function (id) { return document.getElementById(id); };
  function tell() { by("time").textContent = "%for".replace("#", Math.round((Date.now() - begin) / 1000)); }
  function wait() {
    by("again").hidden = true; by("bar").hidden = by("time").hidden = false; by("main").className = "waits";
    clock = setInterval(tell, 1000); tell(); ask();
  }
  function ask() {
    fetch(location.href, { headers: { "Warmproxy-Wait": "1", Accept: "text/plain" }, cache: "no-store" }).then(function (answer) {
      if (answer.status === 204) return location.reload();
      return answer.text().then(function (text) {
        if (text.indexOf("warmproxy: ") !== 0) return location.reload();
        if (answer.status === 503) return void setTimeout(ask, 1000 * answer.headers.get("Retry-After"));
        clearInterval(clock);
        by("bar").hidden = by("time").hidden = true; by("again").hidden = false; by("main").className = "";
        by("title").textContent = document.title = "%failed";
        by("text").textContent = text.slice(11);
      });
    }).catch(function () { setTimeout(ask, 1000); });
  }
  by("again").onclick = function () {
    begin = Date.now(); by("title").textContent = document.title = title; by("text").textContent = text; wait();
  };
  text = by("text").textContent;
  wait();
})();
</script>
)html";

inline constexpr std::string_view failed_part =
    R"html(<a class="again" href="" onclick="location.reload(); return false">%again</a>
)html";

inline std::string escape_html(std::string_view text) {
  std::string out(text);
  replace_all(out, "&", "&amp;");
  replace_all(out, "<", "&lt;");
  replace_all(out, ">", "&gt;");
  replace_all(out, "\"", "&quot;");
  return out;
}

// What leads from an address to itself, without its fragment: with that, a
// browser would take it for a jump within the page. Relative, since a path may
// begin with "//".
inline std::string way_to_itself(std::string_view target) {
  const auto path = target.substr(0, target.find('?'));
  const auto slash = path.rfind('/');
  return slash == path.npos ? std::string()
                            : concat("./", target.substr(slash + 1));
}

// `reason` empty: the waiting page, after `waited`.
inline std::string fill_page(bool chinese, std::string_view target,
                             std::string_view reason, bool never_started,
                             std::chrono::seconds waited) {
  const bool waiting = reason.empty();
  const auto choose = [chinese](const char *en, const char *zh) {
    return chinese ? zh : en;
  };
  const auto failed = choose("This site could not be started", "网站启动失败");
  const std::string clock = choose("Waiting for # s", "已等待 # 秒");
  auto time = clock;
  replace_all(time, "#", std::to_string(waited.count()));
  std::string page(page_template);
  replace_all(page, "%rest", waiting ? waiting_part : failed_part);
  replace_all(page, "%refresh",
              waiting ? "<noscript><meta http-equiv=\"refresh\" "
                        "content=\"2; url=%self\"></noscript>\n"
                      : "");
  replace_all(page, "%waits", waiting ? " class=\"waits\"" : "");
  replace_all(page, "%lang", choose("en", "zh"));
  replace_all(page, "%title",
              waiting ? choose("Starting up …", "正在启动……")
              : never_started
                  ? failed
                  : choose("This page could not be loaded", "页面加载失败"));
  replace_all(page, "%failed", failed);
  replace_all(page, "%again", choose("Try again", "重试"));
  replace_all(page, "%for", clock);
  replace_all(page, "%time", time);
  replace_all(page, "%seconds", std::to_string(waited.count()));
  replace_all(page, "%text",
              waiting ? choose("This site was asleep. It will open here by "
                               "itself in a moment.",
                               "网站刚才处于休眠状态，启动完成后会自动打开。")
                      : escape_html(reason));
  replace_all(page, "%self", escape_html(way_to_itself(target)));
  return page;
}

// A person's browser on its way to a page, and nobody else: where fetch() says
// what it is for (Fetch Metadata), that decides.
inline bool Connection::wants_page() const {
  const auto purpose = request_.value("Sec-Fetch-Dest");
  return request_.method == "GET" &&
         contains(request_.value("Accept"), "text/html") &&
         (purpose.empty() || purpose == "document" || purpose == "iframe");
}

inline bool Connection::in_chinese() const {
  return starts_with_same(request_.value("Accept-Language"), "zh");
}

inline Connection::Step Connection::say(int status, std::string_view reason,
                                        std::string_view lines,
                                        std::string_view body,
                                        std::string_view type) {
  std::string text(body);
  if (!reason.empty()) {
    const bool page = wants_page();
    text = page ? fill_page(in_chinese(), request_.target, reason, false, {})
                : concat("warmproxy: ", reason, "\n");
    type = page ? "text/html; charset=utf-8" : "text/plain; charset=utf-8";
  }
  keep_ =
      request_.keep_alive && request_.framing.done() && !listener_.draining();
  auto out = down_.head.substr(down_.sent); // of a 1xx, perhaps
  append(out, "HTTP/1.1 ", std::to_string(status), " ", status_text(status),
         "\r\n");
  if (status != 204) {
    append(out, "Content-Type: ", type,
           "\r\nContent-Length: ", std::to_string(text.size()), "\r\n");
  }
  append(out, "Cache-Control: no-store\r\n", lines);
  if (!options_.cors_origins.empty()) { write_cors(out); }
  if (!keep_) {
    out += "Connection: close\r\n";
  } else if (request_.minor == 0) {
    out += "Connection: keep-alive\r\n";
  }
  out += "\r\n";
  if (request_.method != "HEAD") { out += text; }
  let_go();
  down_.begin();
  down_.to = &client_;
  down_.head = std::move(out);
  stage_ = Stage::answering;
  deadline_ = loop_.now() + idle_limit;
  return Step::again;
}

inline Connection::Step Connection::send_own_answer() {
  if (down_.can_push() && !down_.push()) { cut_ = true; }
  if (down_.pending() && !cut_) {
    if (loop_.now() < deadline_) { return Step::wait; }
    cut_ = true; // it does not read
  }
  return finish();
}

inline Connection::Step
Connection::say_failure(const Supervisor::Result &result) {
  const auto seconds = (result.retry_after.count() + 999) / 1000;
  const auto retry =
      result.status == 502
          ? std::string()
          : concat("Retry-After: ",
                   std::to_string(std::max<long long>(1, seconds)), "\r\n");
  if (wants_page()) {
    const auto page = fill_page(
        in_chinese(), request_.target, result.reason, true,
        std::chrono::duration_cast<std::chrono::seconds>(result.waited));
    return say(result.status, {}, retry, page, "text/html; charset=utf-8");
  }
  return say(result.status, result.reason, retry);
}

// JSON, or what Prometheus reads.
inline Connection::Step Connection::say_status() {
  const auto status = [this] {
    auto s = listener_.supervisor.status();
    s.connections = listener_.connections();
    return s;
  }();
  const auto up = in_seconds(status.up_for),
             last = in_seconds(status.last_start);
  const auto number = [](auto n) { return std::to_string(n); };
  std::string out;
  if (contains(request_.value("Accept"), "version=0.0.4") ||
      ends_with(request_.target, "format=prometheus")) {
    const auto metric = [&out](std::string_view name, std::string_view type,
                               std::string_view help, std::string_view value) {
      append(out, "# HELP warmproxy_", name, " ", help, "\n# TYPE warmproxy_",
             name, " ", type, "\nwarmproxy_", name, " ", value, "\n");
    };
    metric("target_up", "gauge", "Whether the target is up.",
           status.state == "up" ? "1" : "0");
    metric("target_uptime_seconds", "gauge",
           "Time since the target came up, 0 while it is not.", up);
    metric("target_last_start_duration_seconds", "gauge",
           "How long the last good start took.", last);
    metric("target_starts_total", "counter", "Starts of the target.",
           number(status.starts));
    metric("requests_total", "counter", "Requests handed to the target.",
           number(status.requests));
    metric("requests_in_flight", "gauge",
           "Requests, streams and tunnels with the target.",
           number(status.in_flight));
    metric("client_connections", "gauge", "Open connections of clients.",
           number(status.connections));
    return say(200, {}, {}, out, "text/plain; version=0.0.4; charset=utf-8");
  }
  append(
      out, "{\"state\":\"", status.state, "\",\"pid\":", number(status.pid),
      ",\"port\":", number(status.port), ",\"starts\":", number(status.starts),
      ",\"last_exit\":", json_string(status.last_exit), ",\"up_seconds\":", up);
  append(out, ",\"last_start_seconds\":", last,
         ",\"requests\":", number(status.requests),
         ",\"in_flight\":", number(status.in_flight),
         ",\"connections\":", number(status.connections), "}\n");
  return say(200, {}, {}, out, "application/json");
}

/*
 * Supervisor: what requests see of it
 */

inline Lease::~Lease() {
  if (owner) { owner->release(); }
}

inline std::string Lease::timing() const {
  if (!waited.count()) { return {}; }
  return concat("Server-Timing: warmproxy;desc=\"cold start\";dur=",
                in_ms(waited), ", warmproxy-spawn;dur=", in_ms(spawning),
                ", warmproxy-ready;dur=", in_ms(readying), "\r\n");
}

inline Supervisor::Supervisor(const Options &options, const Log &log)
    : options_(options), log_(log), port_(options.target_port) {
  if (!make_wake_pipe(wake_read_, wake_write_)) {
    throw std::system_error(errno, std::generic_category(), "pipe");
  }
  ::getrlimit(RLIMIT_NOFILE, &files_);
  thread_ = std::thread([this] { run(); });
}

inline Supervisor::~Supervisor() {
  quit();
  thread_.join();
}

inline void Supervisor::quit() {
  const std::lock_guard<std::mutex> lock(mutex_);
  quit_ = true;
  changed();
  wake();
}

inline void Supervisor::wake() { write_wake(wake_write_); }

inline Supervisor::Result Supervisor::acquire(Lease &lease,
                                              Clock::time_point until) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool waits = lease.since != Clock::time_point{};
  Result result;
  if (state_ != State::up) {
    const auto now = Clock::now();
    if (!waits) {
      lease.since = now;
      lease.failures = failures_;
    }
    result.waited = now - lease.since;
    if (quit_) {
      result.status = 503;
      result.reason = "shutting down";
    } else if (failures_ != lease.failures) {
      result.status = failure_.status;
      result.reason = failure_.reason;
      result.retry_after = pause_;
    } else if (state_ != State::starting && !wanted_ && now < not_before_) {
      result.status = 503;
      result.reason =
          concat(failure_.reason, "; it is started again in a moment");
      result.retry_after =
          std::chrono::duration_cast<milliseconds>(not_before_ - now);
    } else if (now >= until) {
      result.status = 503; // and no reason: it is the waiting page that is due
      result.retry_after = std::chrono::seconds(2);
      if (state_ == State::starting) { result.waited = now - started_; }
    } else {
      result.pending = true;
      if (state_ != State::starting && !std::exchange(wanted_, true)) {
        wake();
      }
    }
    return result;
  }
  ++in_flight_;
  ++requests_;
  lease.owner = this;
  lease.generation = generation_;
  lease.port = port_;
  lease.ipv6 = ipv6_;
  if (proof_ && Clock::now() - proved_ < fresh_limit) {
    lease.proof = std::move(proof_);
  }
  if (waits) {
    lease.waited = Clock::now() - lease.since;
    lease.spawning = spawning_;
    lease.readying = readying_;
  }
  return result;
}

inline void Supervisor::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  last_use_ = Clock::now();
  --in_flight_;
}

inline bool Supervisor::is_up(std::uint64_t generation) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return state_ == State::up && generation_ == generation;
}

inline void Supervisor::on_change(std::function<void()> tell) {
  const std::lock_guard<std::mutex> lock(mutex_);
  tell_ = std::move(tell);
}

// Under mutex_, whenever those who wait have reason to look again.
inline void Supervisor::changed() {
  if (tell_) { tell_(); }
}

inline void Supervisor::suspect(const Lease &lease) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (state_ != State::up || lease.generation != generation_) { return; }
  state_ = State::starting;
  suspected_ = true;
  wake();
}

inline void Supervisor::warm() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!std::exchange(wanted_, true)) { wake(); }
}

inline Status Supervisor::status() const {
  using std::chrono::duration_cast;
  static constexpr const char *names[] = {"cold", "starting", "up", "stopping"};
  const std::lock_guard<std::mutex> lock(mutex_);
  Status status;
  status.state = names[static_cast<int>(state_)];
  status.pid = state_ == State::cold ? 0 : static_cast<long>(pid_);
  status.port = port_;
  status.starts = starts_;
  status.last_exit = last_exit_;
  if (state_ == State::up) {
    status.up_for = duration_cast<milliseconds>(Clock::now() - up_since_);
  }
  status.last_start = duration_cast<milliseconds>(spawning_ + readying_);
  status.requests = requests_;
  status.in_flight = in_flight_;
  return status;
}

/*
 * Supervisor: the thread
 */

inline void Supervisor::run() {
  Lock lock(mutex_);
  while (!quit_) {
    if (!wanted_) {
      nap(lock, Clock::time_point::max());
      continue;
    }
    if (start(lock)) { watch(lock); }
    end(lock);
  }
}

// cold -> starting -> up, or a failure that all who wait are told.
inline bool Supervisor::start(Lock &lock) {
  state_ = State::starting;
  wanted_ = suspected_ = false;
  ++starts_;
  spawning_ = readying_ = {};
  exit_.clear();
  const auto began = started_ = Clock::now();
  port_ = options_.target_port ? options_.target_port : free_port();
  lock.unlock();

  std::string error;
  Descriptor found;
  if (options_.target_port) { found = reach(); }
  const bool running = static_cast<bool>(found);
  const bool spawned = !running && spawn(error);
  if (spawned) {
    log_(concat("target started (pid ", std::to_string(pid_), ", port ",
                std::to_string(port_), ")"));
  } else if (running) {
    log_(concat("port ", std::to_string(port_),
                " is served already: using that, starting nothing"));
  }

  lock.lock();
  if (!running && !spawned) {
    fail(lock, 502, concat("the target cannot be started: ", error));
    return false;
  }
  spawning_ = Clock::now() - began;
  if (!prove(lock, true, began + options_.startup_timeout, std::move(found))) {
    return false;
  }
  up_since_ = last_use_ = Clock::now();
  readying_ = up_since_ - began - spawning_;
  ++generation_;
  state_ = State::up;
  changed();
  lock.unlock();
  log_(concat("target up in ", in_seconds(spawning_ + readying_), " s (",
              pid_ ? concat("pid ", std::to_string(pid_), ", ") : "", "port ",
              std::to_string(port_), ")"));
  lock.lock();
  return true;
}

// Waits until the target answers; or, when it had been up and then refused a
// connection, until it takes one again or is dead.
inline bool Supervisor::prove(Lock &lock, bool starting,
                              Clock::time_point deadline,
                              Descriptor connection) {
  const auto began = Clock::now();
  std::string seen = "nothing";
  for (;;) {
    if (quit_) { return false; }
    if (exited()) {
      if (starting) {
        fail(lock, 502, concat("the target ", exit_, " before it was up"));
      }
      return false;
    }
    if (Clock::now() >= deadline) {
      fail(lock, 504,
           concat("the target was not up within ",
                  in_seconds(options_.startup_timeout),
                  " s; it was last seen: ", seen));
      return false;
    }
    lock.unlock();
    if (!connection) { connection = reach(); }
    const int error = errno;
    const bool connected = static_cast<bool>(connection);
    if (!connected) {
      seen = concat("port ", std::to_string(port_), ": ", std::strerror(error));
    }
    const bool good = connected && (!starting || options_.health_path.empty() ||
                                    probe(connection, deadline, seen));
    // When it is us who lack something, that says nothing about the target.
    const bool unclear =
        !connected && !starting && error != ECONNREFUSED && error != ETIMEDOUT;
    lock.lock();
    if (good || unclear) {
      // The connection that proved it is the first one used.
      if (connection) {
        proof_ = std::move(connection);
        proved_ = Clock::now();
      }
      return true;
    }
    connection.reset();
    if (!pid_ && !connected) { return false; } // not ours, and gone
    // A refused connect costs 15 us, so looking every 250 us takes 6 % of a
    // core, and soon less; never is it 2 ms late. A question that was answered
    // with "not yet" costs the target much more.
    using std::chrono::microseconds;
    const auto elapsed =
        std::chrono::duration_cast<microseconds>(Clock::now() - began);
    nap(lock,
        Clock::now() +
            (connected
                 ? std::clamp<microseconds>(elapsed / 50, microseconds(5000),
                                            microseconds(200000))
                 : std::clamp<microseconds>(elapsed / 2000, microseconds(250),
                                            microseconds(2000))));
  }
}

inline Descriptor Supervisor::reach() {
  int error = 0;
  // Whose backlog is full is asked anew sooner than the kernel would.
  for (auto patience = milliseconds(20); patience < milliseconds(20000);
       patience *= 2) {
    for (const bool ipv6 : {false, true}) { // "localhost" is either
      auto connection = connect_to_target(ipv6, port_, patience);
      if (connection) {
        ipv6_ = ipv6;
        return connection;
      }
      if (!ipv6) { error = errno; }
    }
    if (error != ETIMEDOUT) { break; }
  }
  errno = error;
  return {};
}

// Asks for health_path. Sets `seen` to what went wrong; leaves `connection`
// there if it can be used again.
inline bool Supervisor::probe(Descriptor &connection,
                              Clock::time_point deadline, std::string &seen) {
  // Long enough for the slowest first page, since it grows with the wait; and a
  // question that got lost in the boot is asked anew.
  const auto patience = std::max<Clock::duration>(std::chrono::seconds(1),
                                                  Clock::now() - started_);
  const auto limit = std::min(deadline, Clock::now() + patience);
  const auto authority =
      concat(ipv6_ ? "[::1]:" : "127.0.0.1:", std::to_string(port_));
  std::string path = options_.health_path;
  Pages pages;
  Block block(pages);
  Head answer;
  bool more = false;
  // Prometheus, and others, send `/` on to a page that answers 503 until they
  // are ready: what counts is where a browser would end.
  for (int hops = 0; hops < 5; ++hops) {
    const auto request = concat("GET ", path, " HTTP/1.1\r\nHost: ", authority,
                                "\r\nUser-Agent: warmproxy/", WARMPROXY_VERSION,
                                "\r\nAccept: */*\r\n\r\n");
    if (::send(connection.get(), request.data(), request.size(), 0) < 0) {
      seen = concat("no answer to GET ", path);
      return false;
    }
    block.clear();
    std::string text;
    for (;;) {
      if (const auto end = head_end(block.view())) {
        text = std::string(block.view().substr(0, end));
        block.consume(end);
        if (parse_response(text, "GET", answer).status) {
          seen = concat("a malformed answer to GET ", path);
          return false;
        }
        if (answer.status >= 200) { break; }
        continue;
      }
      if (!nap(limit, connection.get())) {
        if (Clock::now() < limit && !quit_ && !exited()) { continue; }
        // When it is the whole start whose time is over, an earlier answer says
        // more than this silence.
        if (limit < deadline || !contains(seen, "answered")) {
          seen = concat("no answer to GET ", path);
        }
        return false;
      }
      const auto n = block.receive(connection.get(), more);
      if (n == 0 || (n < 0 && !would_block(errno)) || block.full()) {
        seen = concat("no answer to GET ", path);
        return false;
      }
    }
    // What is left of the answer is mostly there. If it is not, or if it is
    // large, the connection is not worth the wait.
    answer.framing.take(block.view());
    const auto rest = Clock::now() + milliseconds(2);
    while (!answer.framing.done() && !answer.framing.malformed() &&
           nap(rest, connection.get())) {
      block.clear();
      if (block.receive(connection.get(), more) <= 0) { break; }
      answer.framing.take(block.view());
    }
    if (!answer.framing.done() || !answer.keep_alive) { connection.reset(); }

    auto location = answer.value("Location");
    if (const auto own = concat("http://", authority);
        starts_with(location, own)) {
      location.remove_prefix(own.size());
    }
    const bool here =
        starts_with(location, "/") && !starts_with(location, "//");
    if (answer.status < 300 || answer.status > 399 || !here) { break; }
    path = location.substr(0, location.find('#'));
    if (!connection) {
      connection = connect_to_target(ipv6_, port_, milliseconds(1000));
    }
    if (!connection) { break; }
  }
  if (answer.status < 500) { return true; }
  seen = concat("GET ", path, " answered ", std::to_string(answer.status));
  return false;
}

inline void Supervisor::watch(Lock &lock) {
  while (!quit_) {
    if (exited()) {
      const auto lived = Clock::now() - up_since_;
      // One that dies again and again as soon as it is up is not restarted any
      // faster than one that cannot start; the first time may be chance.
      const bool at_once = lived < milliseconds(250);
      if (!at_once) { pause_ = milliseconds(0); }
      not_before_ = Clock::now() + pause_;
      if (at_once) { pause_ = next_pause(); }
      failure_.reason = concat("the target ", exit_);
      state_ = State::stopping;
      lock.unlock();
      log_(concat("target ", exit_, " after ", in_seconds(lived),
                  " s; the next request starts it again"));
      lock.lock();
      return;
    }
    if (suspected_) {
      suspected_ = false;
      proof_.reset();
      if (!prove(lock, false, Clock::now() + options_.startup_timeout, {})) {
        if (exited()) { continue; }
        return;
      }
      state_ = State::up;
      changed();
    }
    const auto now = Clock::now();
    if (now - proved_ >= fresh_limit) { proof_.reset(); }
    auto next = proof_ ? proved_ + fresh_limit : Clock::time_point::max();
    if (options_.idle_stop.count() && pid_) {
      if (in_flight_) { last_use_ = now; }
      if (now - last_use_ >= options_.idle_stop) {
        pause_ = milliseconds(0);
        state_ = State::stopping;
        lock.unlock();
        log_(concat("target stopped: nothing to do for ",
                    in_seconds(options_.idle_stop), " s"));
        lock.lock();
        return;
      }
      // A request that ends meanwhile moves last_use_, never back: what we
      // find then is when to look again.
      next = std::min(next, last_use_ + options_.idle_stop);
    }
    nap(lock, next);
  }
}

// Stops what is left of the target's group, and is cold.
inline void Supervisor::end(Lock &lock) {
  state_ = State::stopping;
  proof_.reset();
  changed();
  lock.unlock();
  if (pid_ > 0) {
    // When the target itself is gone, the rest of its group only holds the port
    // that the next one needs.
    const auto deadline =
        Clock::now() + (exited() ? milliseconds(0) : options_.stop_timeout);
    if (!exited()) { ::kill(-pid_, SIGTERM); }
    const auto wait_until = [this](Clock::time_point until) {
      while (!(exited() && group_ended()) && Clock::now() < until) {
        nap(Clock::now() + milliseconds(exited() ? 1 : 10));
      }
    };
    wait_until(deadline);
    if (!(exited() && group_ended())) {
      ::kill(-pid_, SIGKILL);
      // A second for init to reap them; the target itself is reaped by us.
      wait_until(Clock::now() +
                 std::min(options_.stop_timeout, milliseconds(1000)));
      while (!exited()) {
        nap(Clock::now() + milliseconds(10));
      }
    }
    tell_guard(0);
  }
  lock.lock();
  if (pid_ > 0) { last_exit_ = exit_; }
  pid_ = 0;
  pidfd_.reset();
  state_ = State::cold;
  changed();
}

inline milliseconds Supervisor::next_pause() const {
  return std::clamp(pause_ * 2, milliseconds(100), milliseconds(5000));
}

// Tells everybody who waits for this start that it came to nothing.
inline void Supervisor::fail(Lock &lock, int status, std::string reason) {
  pause_ = next_pause();
  not_before_ = Clock::now() + pause_;
  failure_ = {status, std::move(reason)};
  ++failures_;
  state_ = State::stopping;
  changed();
  const auto message = failure_.reason;
  lock.unlock();
  log_(message);
  lock.lock();
}

// Whether the target has ended; then exit_ says how.
inline bool Supervisor::exited() {
  if (pid_ <= 0) { return false; }
  if (!exit_.empty()) { return true; }
  int status = 0;
  const auto ended = ::waitpid(pid_, &status, WNOHANG);
  if (ended == 0 || (ended < 0 && errno == EINTR)) { return false; }
  if (ended < 0) { // the program we are in ignores SIGCHLD, or took it
    exit_ = "ended";
  } else if (WIFSIGNALED(status)) {
    exit_ = concat("was killed by signal ", std::to_string(WTERMSIG(status)));
  } else {
    exit_ = concat("exited with status ", std::to_string(WEXITSTATUS(status)));
  }
  return true;
}

// Only to be asked when the target itself has been reaped: a zombie counts.
inline bool Supervisor::group_ended() const {
  // Where we are the first process of a container, its orphans are ours.
  while (::waitpid(-pid_, nullptr, WNOHANG) > 0) {}
  return ::kill(-pid_, 0) != 0 && errno == ESRCH;
}

// Sleeps until `until`, the target's end, a word from wake(), or until `fd`, if
// any, can be read: that is what it returns.
inline bool Supervisor::nap(Clock::time_point until, int fd) {
  const int child = exit_.empty() ? pidfd_.get() : -1;
  if (pid_ > 0 && child < 0) { // no pidfd here: look again and again
    until = std::min(until, Clock::now() + milliseconds(10));
  }
  pollfd fds[] = {
      {fd, POLLIN, 0}, {wake_read_.get(), POLLIN, 0}, {child, POLLIN, 0}};
  wait_for(fds, until);
  if (fds[1].revents) { read_wakes(wake_read_); }
  return fds[0].revents != 0;
}

inline void Supervisor::nap(Lock &lock, Clock::time_point until) {
  lock.unlock();
  nap(until);
  lock.lock();
}

/*
 * Supervisor: the child
 */

// Finds the program as Options::binary says; "" if there is none that we may
// execute.
inline std::string find_binary(const std::string &name) {
  namespace fs = std::filesystem;
  std::vector<std::string> places;
  std::error_code error;
  if (contains(name, "/")) {
    places.push_back(name);
    const auto self = fs::read_symlink("/proc/self/exe", error);
    if (!error && name[0] != '/') {
      places.push_back(self.parent_path() / name);
    }
  } else {
    const char *path = std::getenv("PATH");
    std::string_view rest = path ? path : "/usr/local/bin:/usr/bin:/bin";
    for (bool more = true; more;) {
      const auto colon = rest.find(':');
      places.push_back(concat(rest.substr(0, colon), "/", name));
      more = colon != std::string_view::npos;
      rest.remove_prefix(more ? colon + 1 : 0);
    }
  }
  for (const auto &place : places) {
    if (fs::is_regular_file(place, error) &&
        ::access(place.c_str(), X_OK) == 0) {
      const auto found =
          fs::absolute(place, error); // the target may run elsewhere
      return found.lexically_normal();
    }
  }
  return {};
}

// Makes or renews the writable copy of `from`: what is newer there is kept.
inline void copy_to_scratch(const std::filesystem::path &from,
                            const std::filesystem::path &to) {
  namespace fs = std::filesystem;
  const auto writable = [](const fs::path &path) {
    fs::permissions(path, fs::perms::owner_write, fs::perm_options::add);
  };
  fs::create_directories(to);
  const auto copy = fs::canonical(to);
  for (auto entry = fs::recursive_directory_iterator(from);
       entry != fs::recursive_directory_iterator(); ++entry) {
    const auto target = to / entry->path().lexically_relative(from);
    if (entry->is_symlink()) {
      if (!fs::is_symlink(fs::symlink_status(target))) {
        fs::copy_symlink(entry->path(), target);
      }
    } else if (entry->is_directory()) {
      if (fs::canonical(entry->path()) == copy) {
        entry.disable_recursion_pending(); // the copy itself lies within
        continue;
      }
      fs::create_directory(target, entry->path());
      writable(target);
    } else if (entry->is_regular_file()) {
      fs::copy_file(entry->path(), target, fs::copy_options::update_existing);
      writable(target);
    }
  }
}

// All that the child needs, made before it is: between vfork(2) and execve(2)
// it runs in our memory, where it may neither allocate nor lock.
struct Launch {
  const char *path;
  char *const *arguments;
  char *const *environment;
  const char *directory; // null: ours
  int guard;
  int report; // takes errno, closes by execve
  pid_t parent;
  rlimit files;
};

[[noreturn]] inline void become_target(const Launch &launch) {
  ::setpgid(0, 0);
#ifdef __linux__
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != launch.parent) { ::_exit(127); } // we died just before
#endif
  const pid_t self = ::getpid();
  if (::write(launch.guard, &self, sizeof(self)) < 0) {}
  for (int number = 1; number < NSIG; ++number) { // httplib ignores SIGPIPE
    ::signal(number, SIG_IGN);                    // what is pending is for us
    ::signal(number, SIG_DFL);
  }
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::setrlimit(RLIMIT_NOFILE, &launch.files);
  const int null = ::open("/dev/null", O_RDONLY);
  if (null > 0) { ::dup2(null, 0); }
  close_from(3, true);
  if (!launch.directory || ::chdir(launch.directory) == 0) {
    ::execve(launch.path, launch.arguments, launch.environment);
  }
  const int error = errno;
  if (::write(launch.report, &error, sizeof(error)) < 0) {}
  ::_exit(127);
}

inline bool Supervisor::spawn(std::string &error) {
  namespace fs = std::filesystem;
  auto path = find_binary(options_.binary);
  auto directory = options_.directory;
  if (path.empty()) {
    error = "there is no such program";
    return false;
  }
  if (!port_) {
    error = "there is no free port";
    return false;
  }
  if (!options_.scratch.empty()) {
    try {
      const auto from = fs::canonical(directory.empty() ? "." : directory);
      const auto to = fs::absolute(options_.scratch);
      if (!std::exchange(scratched_, true)) { copy_to_scratch(from, to); }
      const auto within = fs::path(path).lexically_relative(from);
      if (*within.begin() != "..") { path = to / within; }
      directory = to;
    } catch (const fs::filesystem_error &e) {
      scratched_ = false;
      log_(concat("cannot copy to scratch: ", e.what()));
      error = concat("no copy in scratch: ", e.code().message());
      return false;
    }
  }

  const auto port = std::to_string(port_);
  std::vector<std::string> arguments{options_.binary};
  arguments.insert(arguments.end(), options_.args.begin(), options_.args.end());
  for (auto &argument : arguments) {
    replace_all(argument, "{port}", port);
  }
  std::map<std::string, std::string> variables;
  for (auto variable = environ; *variable; ++variable) {
    const std::string_view text = *variable;
    const auto name = text.substr(0, text.find('='));
    if (name.size() == text.size() || starts_with(name, "WARMPROXY_") ||
        name == "VERCEL_IPC_PATH" || name == "HOST") { // HOST is for us
      continue;
    }
    variables[std::string(name)] = text.substr(name.size() + 1);
  }
  variables["PORT"] = port;
  for (auto [name, value] : options_.env) {
    replace_all(value, "{port}", port);
    variables[name] = value;
  }
  std::vector<std::string> environment;
  for (const auto &[name, value] : variables) {
    environment.push_back(concat(name, "=", value));
  }
  const auto pointers = [](std::vector<std::string> &texts) {
    std::vector<char *> all;
    for (auto &text : texts) {
      all.push_back(text.data());
    }
    all.push_back(nullptr);
    return all;
  };
  const auto argv = pointers(arguments), envp = pointers(environment);

  Descriptor reading, writing;
  if (!make_pipe(reading, writing)) {
    error = std::strerror(errno);
    return false;
  }
  const Launch launch{
      path.c_str(),  argv.data(),
      envp.data(),   directory.empty() ? nullptr : directory.c_str(),
      guard_.pipe(), writing.get(),
      ::getpid(),    files_};
  // No handler of ours may run in the child.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t pid = ::vfork();
  if (pid == 0) { become_target(launch); }
  int failure = pid < 0 ? errno : 0;
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  writing.reset();
  if (pid > 0 &&
      ::read(reading.get(), &failure, sizeof(failure)) == sizeof(failure)) {
    while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {}
    tell_guard(0);
  }
  if (failure) {
    error = std::strerror(failure);
    return false;
  }
#if defined(__linux__) && defined(SYS_pidfd_open)
  pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
#endif
  const std::lock_guard<std::mutex> lock(mutex_);
  pid_ = pid;
  return true;
}

inline void Supervisor::tell_guard(pid_t group) const {
  if (::write(guard_.pipe(), &group, sizeof(group)) < 0) {}
}

inline Guard::Guard() {
  Descriptor reading;
  if (!make_pipe(reading, pipe_)) { return; }
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  pid_ = ::fork();
  if (pid_ == 0) {
    ::setsid(); // whoever kills our group shall not have killed it first
    ::dup2(reading.get(), 0);
    close_from(1, false);
    pid_t group = 0;
    while (::read(0, &group, sizeof(group)) == sizeof(group)) {}
    if (group > 0) { ::kill(-group, SIGKILL); }
    ::_exit(0);
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (pid_ < 0) { pipe_.reset(); }
}

inline Guard::~Guard() {
  pipe_.reset();
  if (pid_ > 0) {
    while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {}
  }
}

/*
 * Vercel
 */

inline std::unique_ptr<Vercel> Vercel::connect() {
  const char *path = std::getenv("VERCEL_IPC_PATH");
  sockaddr_un address{};
  if (!path || std::strlen(path) >= sizeof(address.sun_path)) { return {}; }
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, path);
  auto vercel = std::make_unique<Vercel>();
  vercel->socket_ = new_socket(AF_UNIX);
  if (::connect(vercel->socket_.get(), reinterpret_cast<sockaddr *>(&address),
                sizeof(address)) != 0) {
    return {};
  }
  return vercel;
}

inline void Vercel::started(milliseconds took, int port) {
  send(concat("{\"type\":\"server-started\",\"payload\":{\"initDuration\":",
              std::to_string(took.count()),
              ",\"httpPort\":", std::to_string(port), "}}"));
}

inline void Vercel::end(std::string_view invocation, std::string_view request) {
  std::uint64_t number = 0; // stays 0 where there is none
  to_number(request, number);
  send(concat("{\"type\":\"end\",\"payload\":{\"context\":{\"invocationId\":",
              json_string(invocation),
              ",\"requestId\":", std::to_string(number), "}}}"));
}

inline void Vercel::unrecoverable(int exit_code, std::string_view message) {
  send(concat("{\"type\":\"unrecoverable-error\",\"payload\":{\"exitCode\":",
              std::to_string(exit_code), ",\"message\":", json_string(message),
              "}}"));
}

inline void Vercel::send(std::string message) {
  message += '\0';
  const std::lock_guard<std::mutex> lock(mutex_); // whole, or they mix
  waiting_ += message;
  flush();
  if (waiting_.empty()) { return; }
  // The platform's pace is not to be that of every request.
  if (!writer_.joinable()) {
    writer_ = std::thread([this] { write_waiting(); });
  }
  more_.notify_one();
}

// Sends what can be sent now. Under mutex_.
inline void Vercel::flush() {
  while (!waiting_.empty()) {
    const auto n =
        ::send(socket_.get(), waiting_.data(), waiting_.size(), MSG_DONTWAIT);
    if (n < 0 && would_block(errno)) { return; }
    // Should nobody listen any more, nobody misses it.
    waiting_.erase(0, n > 0 ? static_cast<std::size_t>(n) : waiting_.npos);
  }
}

inline void Vercel::write_waiting() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    more_.wait(lock, [this] { return over_ || !waiting_.empty(); });
    if (waiting_.empty()) { return; }
    lock.unlock();
    pollfd fds[] = {{socket_.get(), POLLOUT, 0}};
    const bool ready = wait_for(fds, Clock::now() + std::chrono::seconds(2));
    lock.lock();
    if (over_ && !ready) { return; } // it had its time
    flush();
  }
}

inline Vercel::~Vercel() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
    more_.notify_one();
  }
  if (writer_.joinable()) { writer_.join(); }
}

/*
 * The environment
 */

// Splits as a POSIX shell would, without expansions.
inline bool split_words(std::string_view text,
                        std::vector<std::string> &words) {
  words.clear();
  bool inside = false; // of a word
  char quote = '\0';
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\\' && quote != '\'' && text.substr(i + 1, 1) == "\n") {
      ++i; // the line goes on
      continue;
    }
    if (!quote && (c == ' ' || c == '\t' || c == '\n')) {
      inside = false;
      continue;
    }
    if (!std::exchange(inside, true)) { words.emplace_back(); }
    if (c == '\\' && quote != '\'') {
      if (++i == text.size()) { return false; }
      // Between double quotes, it is one only before these.
      if (quote && !contains("\"\\$`", text.substr(i, 1))) {
        words.back() += c;
      }
      words.back() += text[i];
    } else if (quote ? c == quote : c == '"' || c == '\'') {
      quote = quote ? '\0' : c;
    } else {
      words.back() += c;
    }
  }
  return !quote;
}

inline bool read(std::string_view text, std::string &field) {
  field = text;
  return true;
}

inline bool read(std::string_view text, std::vector<std::string> &field) {
  field.clear();
  for_each_of(text, [&](std::string_view item) { field.emplace_back(item); });
  return true;
}

inline bool read(std::string_view text, bool &field) {
  const auto is_one_of = [text](std::initializer_list<const char *> words) {
    return std::any_of(words.begin(), words.end(),
                       [text](const char *word) { return same(text, word); });
  };
  field = is_one_of({"1", "true", "yes", "on"});
  return field || is_one_of({"0", "false", "no", "off"});
}

inline bool read(std::string_view text, int &field) { // a port
  return to_number(text, field) && field <= 65535;
}

inline bool read(std::string_view text, std::size_t &field) {
  return to_number(text, field) && field > 0;
}

template <typename Period>
bool read(std::string_view text,
          std::chrono::duration<std::int64_t, Period> &field) {
  const auto digits =
      std::min(text.find_first_not_of("0123456789"), text.size());
  const auto unit = text.substr(digits);
  std::int64_t number = 0, factor = 0;
  for (const auto &[name, value] : {std::pair<const char *, int>{"ms", 1},
                                    {"s", 1000},
                                    {"m", 60000},
                                    {"h", 3600000},
                                    {"d", 86400000}}) {
    if (unit == name) { factor = value; }
  }
  // No more than has room in the nanoseconds of a clock.
  if (!to_number(text.substr(0, digits), number) ||
      (!factor && (number || !unit.empty())) ||
      (factor && number > std::int64_t{1000000000000} / factor)) {
    return false;
  }
  const milliseconds time(number * factor);
  field =
      std::chrono::duration_cast<std::chrono::duration<std::int64_t, Period>>(
          time);
  return field == time; // no half seconds where whole ones are counted
}

template <auto Field> bool setting(std::string_view text, Options &options) {
  return read(text, options.*Field);
}

template <auto Field> bool path(std::string_view text, Options &options) {
  return read(text, options.*Field) && (text.empty() || text[0] == '/');
}

struct Setting {
  const char *variable;
  bool (*read)(std::string_view text, Options &options);
};

// What options_from_env() reads and --help names.
inline constexpr Setting settings[] = {
    {"WARMPROXY_BINARY", setting<&Options::binary>},
    {"WARMPROXY_ARGS",
     [](std::string_view text, Options &options) {
       return split_words(text, options.args);
     }},
    {"WARMPROXY_TARGET_PORT", setting<&Options::target_port>},
    {"WARMPROXY_DIRECTORY", setting<&Options::directory>},
    {"WARMPROXY_SCRATCH", setting<&Options::scratch>},
    {"WARMPROXY_STRIP_PREFIX", setting<&Options::strip_prefix>},
    {"WARMPROXY_PREWARM", setting<&Options::prewarm>},
    {"WARMPROXY_HEALTH_PATH", path<&Options::health_path>},
    {"WARMPROXY_STARTUP_TIMEOUT", setting<&Options::startup_timeout>},
    {"WARMPROXY_STOP_TIMEOUT", setting<&Options::stop_timeout>},
    {"WARMPROXY_IDLE_STOP", setting<&Options::idle_stop>},
    {"WARMPROXY_MAX_CONNECTIONS", setting<&Options::max_connections>},
    {"WARMPROXY_CORS_ORIGINS", setting<&Options::cors_origins>},
    {"WARMPROXY_CDN_CACHE", setting<&Options::cdn_cache>},
    {"WARMPROXY_WAITING_PAGE_AFTER", setting<&Options::waiting_page_after>},
    {"WARMPROXY_STATUS_PATH", path<&Options::status_path>},
    {"PORT", setting<&Options::port>},
    {"HOST", setting<&Options::host>}};

// The first setting that cannot be read is left in Options::error.
template <typename Lookup>
Options read_settings(Options options, Lookup &&lookup) {
  for (const auto &setting : settings) {
    const char *text = lookup(setting.variable);
    if (text && !setting.read(text, options) && options.error.empty()) {
      options.error =
          concat(setting.variable, "=\"", text, "\" cannot be read");
    }
  }
  return options;
}

} // namespace detail

/*
 * Proxy, options_from_env, serve
 */

inline Proxy::Proxy(Options options, detail::Vercel *vercel)
    : options_([&] {
        if (options.error.empty() && options.binary.empty()) {
          options.error = "Options::binary is empty";
        }
        if (!options.error.empty()) {
          throw std::invalid_argument("warmproxy: " + options.error);
        }
        return std::move(options);
      }()),
      log_(options_.log ? options_.log : detail::log_to_stderr),
      supervisor_(options_, log_),
      listener_(options_, log_, supervisor_, vercel) {}

inline bool Proxy::listen(const std::string &host, int port) {
  return listener_.bind(host, port) >= 0 && listen_after_bind();
}

inline int Proxy::bind_to_any_port(const std::string &host) {
  return listener_.bind(host, 0);
}

inline bool Proxy::listen_after_bind() {
  if (options_.prewarm) { supervisor_.warm(); }
  return listener_.run();
}

inline Status Proxy::status() const {
  auto status = supervisor_.status();
  status.connections = listener_.connections();
  return status;
}

inline Options options_from_env(Options defaults) {
  return detail::read_settings(
      std::move(defaults), [](const char *name) { return std::getenv(name); });
}

inline int serve(Options options, int argc, const char *const *argv) {
  const auto began = detail::Clock::now();
  const std::string_view argument = argc > 1 ? argv[1] : "";
  if (argument == "--version") {
    std::puts("warmproxy " WARMPROXY_VERSION);
    return 0;
  }
  if (argument == "--help" || argument == "-h") {
    std::puts("warmproxy " WARMPROXY_VERSION
              ": starts an HTTP server with its first request, waits until\n"
              "it is up, and hands every byte through. The environment sets it "
              "up:\n");
    std::string line;
    for (const auto &setting : detail::settings) {
      if (line.size() + std::strlen(setting.variable) > 76) {
        std::puts(line.c_str());
        line.clear();
      }
      detail::append(line, "  ", setting.variable);
    }
    std::puts(line.c_str());
    std::puts("\nTimes are 500ms, 45s, 10m, 2h, 30d; {port} in arguments is "
              "the target's port.");
    return 0;
  }

  ::signal(SIGPIPE, SIG_IGN); // as httplib does, but before the first write
  const auto log = options.log ? options.log : detail::log_to_stderr;
  const auto vercel = detail::Vercel::connect();
  const auto give_up = [&](int status, std::string_view message) {
    const auto line = detail::printable(std::string(message));
    log(line);
    if (vercel) { vercel->unrecoverable(status, line); }
    return status;
  };
  if (argc > 1) {
    return give_up(2, detail::concat(argument, " is no argument; see --help"));
  }
  if (!options.error.empty()) { return give_up(2, options.error); }
  if (detail::find_binary(options.binary).empty()) {
    return give_up(2, detail::concat("binary \"", options.binary,
                                     "\" is missing or not executable"));
  }
  if (options.target_port && options.target_port == options.port) {
    return give_up(2, "target_port is the port that we listen on ourselves");
  }
  if (vercel) {
    if (options.host == "0.0.0.0") { options.host = "127.0.0.1"; }
    const auto variable = [](const char *name) {
      const char *value = std::getenv(name);
      return std::string(detail::trim(value ? value : ""));
    };
    const auto strip = variable("VERCEL_SERVICE_ROUTE_PREFIX_STRIP");
    if ((strip == "1" || detail::same(strip, "true")) &&
        options.strip_prefix.empty()) {
      options.strip_prefix = variable("VERCEL_SERVICE_ROUTE_PREFIX");
    }
    for (const auto name : {"HOME", "TMPDIR"}) {
      if (!std::getenv(name)) { options.env.emplace(name, "/tmp"); }
    }
    // The platform grants 500 ms after SIGTERM: for our drain and the target's.
    options.stop_timeout =
        std::min(options.stop_timeout, std::chrono::milliseconds(200));
  }

  sigset_t signals, before;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  for (const int number : {SIGINT, SIGHUP}) {
    struct sigaction action {};
    ::sigaction(number, nullptr, &action); // nohup(1) has it ignored
    if (action.sa_handler != SIG_IGN) { ::sigaddset(&signals, number); }
  }
  // Before there are threads, so that all of them leave these to sigwait().
  ::pthread_sigmask(SIG_BLOCK, &signals, &before);

  const auto host = options.host;
  const int wanted = options.port;
  const auto binary = options.binary;
  const bool prewarm = options.prewarm;
  Proxy proxy(std::move(options), vercel.get());
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max; // the target keeps what we were given
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  errno = 0;
  const int port = proxy.listener_.bind(host, wanted);
  if (port < 0) { // getaddrinfo(3) leaves errno alone
    const auto why = errno ? std::strerror(errno) : "no such address";
    return give_up(1, detail::concat("cannot listen on ", host, ":",
                                     std::to_string(wanted), ": ", why));
  }
  log(detail::concat(
      "listening on ", host, ":", std::to_string(port), "; ", binary,
      prewarm ? " starts now" : " starts with the first request"));

  std::atomic<bool> asked{false};
  bool good = true;
  const auto main_thread = ::pthread_self();
  std::thread listening([&] {
    good = proxy.listen_after_bind();
    if (!asked.exchange(true)) { ::pthread_kill(main_thread, SIGTERM); }
  });
  if (vercel) {
    vercel->started(std::chrono::duration_cast<std::chrono::milliseconds>(
                        detail::Clock::now() - began),
                    port);
  }
  int number = 0;
  ::sigwait(&signals, &number);
  if (!asked.exchange(true)) {
    log("stopping: running requests may finish; a second signal ends them");
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr); // the second one kills us
    proxy.stop();
  }
  listening.join();
  return good ? 0 : give_up(1, "cannot accept connections any more");
}

} // namespace warmproxy

#endif // WARMPROXY_HPP
