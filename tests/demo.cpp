// A small web application that takes two seconds to boot, to try warmproxy
// with: a page with a script and a style sheet, a form, an event stream and a
// WebSocket. It stands for a real program and does not depend on warmproxy.

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>

namespace {

constexpr int boot_ms = 2000; // DEMO_BOOT_MS overrides it
constexpr std::size_t max_head = 64 << 10;
constexpr std::size_t max_form = 1 << 20;
constexpr std::size_t max_message = 16 << 20; // of a WebSocket

using Clock = std::chrono::steady_clock;

const auto began = Clock::now();
double booted_in = 0; // seconds
std::atomic<int> requests{0};

double age() {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

std::string seconds(double s) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", s);
  return text;
}

// ---- the page --------------------------------------------------------------

const char *const page = R"(<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>warmproxy: the demo is up</title>
<link rel="stylesheet" href="style.css">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><circle cx='8' cy='8' r='7' fill='%23e8590c'/></svg>">
<script src="app.js" defer></script>
<header>
  <h1>It is up.</h1>
  <p>This is the demo behind <b>warmproxy</b>, a program that needed
  <b>{boot}</b> to boot. The first request started it; from now on it is warm.</p>
</header>
<main>
  <section>
    <h2>This visit</h2>
    <p class="big" id="visit">…</p>
    <p id="visit-more">A request with a cold start waits for the boot; a warm
    one does not.</p>
    <button id="again">Ask again</button>
  </section>
  <section>
    <h2>Event stream</h2>
    <p class="big" id="up">…</p>
    <p>One event per second, forwarded at once.</p>
    <div id="beats" aria-hidden="true"></div>
  </section>
  <section>
    <h2>WebSocket</h2>
    <form id="talk">
      <input name="text" aria-label="Message" placeholder="Say something" autocomplete="off">
      <button>Send</button>
    </form>
    <ol id="echo" aria-live="polite"></ol>
  </section>
  <section>
    <h2>Form</h2>
    <form method="post" action="hello">
      <input name="name" aria-label="Name" placeholder="Your name" required>
      <button>Post</button>
    </form>
    <p>An ordinary POST and the page that it returns.</p>
  </section>
</main>
<footer>Requests so far: {requests} · process {pid}</footer>
</html>
)";

const char *const hello = R"(<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hello</title>
<link rel="stylesheet" href="style.css">
<header>
  <h1>Hello, {name}.</h1>
  <p><a href="./">Back to the demo</a></p>
</header>
</html>
)";

const char *const style = R"(:root {
  color-scheme: light dark;
  --ground: #fbf8f4; --card: #fff; --ink: #2b2622; --soft: #7a6f66;
  --line: #e9e1d8; --warm: #e8590c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #191613; --card: #221e1a; --ink: #f1e9e0; --soft: #a5988c;
    --line: #38312a; --warm: #ff8a3d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 52rem; padding: 3rem 1.25rem;
  background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 2.5rem; letter-spacing: -0.02em; }
h1::before {
  content: ""; display: inline-block; width: .55em; height: .55em;
  margin-right: .35em; border-radius: 50%; background: var(--warm);
}
h2 {
  margin: 0 0 .5rem; color: var(--soft);
  font-size: .8rem; letter-spacing: .08em; text-transform: uppercase;
}
header p { max-width: 34rem; color: var(--soft); }
header b { color: var(--ink); }
main {
  display: grid; gap: 1rem; margin: 2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr));
}
section {
  padding: 1.25rem; border: 1px solid var(--line); border-radius: .75rem;
  background: var(--card);
}
section p { margin: .25rem 0 .75rem; color: var(--soft); }
section p.big {
  color: var(--ink); font-size: 1.75rem; font-weight: 600;
  font-variant-numeric: tabular-nums;
}
form { display: flex; gap: .5rem; margin-bottom: .75rem; }
input, button {
  padding: .5rem .75rem; border: 1px solid var(--line); border-radius: .5rem;
  background: transparent; color: inherit; font: inherit;
}
input { flex: 1; min-width: 0; }
button { border-color: var(--warm); color: var(--warm); cursor: pointer; }
button:hover { background: var(--warm); color: var(--card); }
:focus-visible { outline: 2px solid var(--warm); outline-offset: 2px; }
a { color: var(--warm); }
ol { margin: 0; padding: 0; max-height: 8rem; overflow: auto; list-style: none; }
#beats { display: flex; gap: .25rem; height: .5rem; }
#beats i { width: .5rem; border-radius: 50%; background: var(--warm); }
footer { color: var(--soft); font-size: .85rem; }
)";

const char *const script = R"('use strict';
const $ = id => document.getElementById(id);

// Server-Timing says whether this page waited for a start.
const visit = performance.getEntriesByType('navigation')[0];
const cold = (visit.serverTiming || []).find(t => t.name === 'warmproxy');
const took = Math.round(visit.responseStart - visit.requestStart);
$('visit').textContent = `${cold ? 'Cold' : 'Warm'}, ${took} ms`;

$('again').onclick = async () => {
  const start = performance.now();
  await (await fetch('app.js?' + start, {cache: 'no-store'})).text();
  $('visit').textContent = `${(performance.now() - start).toFixed(1)} ms`;
  $('visit-more').textContent = 'One more request.';
};

new EventSource('events').onmessage = event => {
  $('up').textContent = `Up for ${event.data} s`;
  $('beats').append(document.createElement('i'));
  if ($('beats').children.length > 20) $('beats').replaceChildren();
};

let socket;
const say = text => {
  const line = document.createElement('li');
  line.textContent = text;
  $('echo').prepend(line);
};
$('talk').onsubmit = event => {
  event.preventDefault();
  const {text} = event.target.elements;
  const send = () => { socket.send(text.value); text.value = ''; };
  if (socket && socket.readyState === WebSocket.OPEN) return send();
  socket = new WebSocket(new URL('echo', location).href.replace('http', 'ws'));
  socket.onopen = send;
  socket.onmessage = message => say('↩ ' + message.data);
  socket.onclose = () => say('closed');
};
)";

std::string replaced(std::string text, const std::string &what,
                     const std::string &by) {
  const auto at = text.find(what);
  return at == std::string::npos ? text : text.replace(at, what.size(), by);
}

std::string html_escaped(const std::string &text) {
  std::string out;
  for (auto c : text) {
    switch (c) {
    case '&': out += "&amp;"; break;
    case '<': out += "&lt;"; break;
    case '>': out += "&gt;"; break;
    case '"': out += "&quot;"; break;
    default: out += c;
    }
  }
  return out;
}

// The value of a field of a form as browsers post it.
std::string form_field(const std::string &form, const std::string &name) {
  auto at = ("&" + form).find("&" + name + "=");
  if (at == std::string::npos) { return {}; }
  std::string value;
  for (at += name.size() + 1; at < form.size() && form[at] != '&'; ++at) {
    if (form[at] == '%' && at + 2 < form.size()) {
      const auto hex = form.substr(at + 1, 2);
      value += static_cast<char>(std::strtol(hex.c_str(), nullptr, 16));
      at += 2;
    } else {
      value += form[at] == '+' ? ' ' : form[at];
    }
  }
  return value;
}

// ---- SHA-1 and base64 for the WebSocket handshake ---------------------------

std::array<std::uint8_t, 20> sha1(std::string text) {
  const auto rotate = [](std::uint32_t x, int n) {
    return x << n | x >> (32 - n);
  };
  std::uint32_t h[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476,
                        0xC3D2E1F0};
  const std::uint64_t bits = text.size() * 8;
  text += '\x80';
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8);
  for (int shift = 56; shift >= 0; shift -= 8) {
    text += static_cast<char>(bits >> shift);
  }
  for (std::size_t block = 0; block < text.size(); block += 64) {
    std::uint32_t w[80];
    for (std::size_t i = 0; i < 80; ++i) {
      if (i < 16) {
        w[i] = 0;
        for (std::size_t b = 0; b < 4; ++b) {
          w[i] = w[i] << 8 | static_cast<std::uint8_t>(text[block + i * 4 + b]);
        }
      } else {
        w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
      }
    }
    auto a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (std::size_t i = 0; i < 80; ++i) {
      const auto mixed = i < 20   ? ((b & c) | (~b & d)) + 0x5A827999
                         : i < 40 ? (b ^ c ^ d) + 0x6ED9EBA1
                         : i < 60 ? ((b & c) | (b & d) | (c & d)) + 0x8F1BBCDC
                                  : (b ^ c ^ d) + 0xCA62C1D6;
      const auto next = rotate(a, 5) + mixed + e + w[i];
      e = d;
      d = c;
      c = rotate(b, 30);
      b = a;
      a = next;
    }
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
    h[4] += e;
  }
  std::array<std::uint8_t, 20> digest{};
  for (std::size_t i = 0; i < 20; ++i) {
    digest[i] = static_cast<std::uint8_t>(h[i / 4] >> (24 - i % 4 * 8));
  }
  return digest;
}

std::string base64(const std::array<std::uint8_t, 20> &data) {
  const char *const letters =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < data.size(); i += 3) {
    std::uint32_t group = 0;
    for (std::size_t b = 0; b < 3; ++b) {
      group = group << 8 | (i + b < data.size() ? data[i + b] : 0u);
    }
    for (std::size_t c = 0; c < 4; ++c) {
      out += i + c > data.size() ? '=' : letters[group >> (18 - c * 6) & 63];
    }
  }
  return out;
}

bool is_utf8(const std::string &text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t n) {
      return i + n < text.size() ? static_cast<std::uint8_t>(text[i + n]) : 0u;
    };
    const unsigned first = byte(0);
    const std::size_t length = first < 0x80                    ? 1
                               : first >= 0xC2 && first < 0xE0 ? 2
                               : first >= 0xE0 && first < 0xF0 ? 3
                               : first >= 0xF0 && first < 0xF5 ? 4
                                                               : 0;
    if (length == 0) { return false; }
    for (std::size_t n = 1; n < length; ++n) {
      if ((byte(n) & 0xC0) != 0x80) { return false; }
    }
    // Overlong forms, surrogates, and code points beyond U+10FFFF.
    if ((first == 0xE0 && byte(1) < 0xA0) ||
        (first == 0xED && byte(1) > 0x9F) ||
        (first == 0xF0 && byte(1) < 0x90) ||
        (first == 0xF4 && byte(1) > 0x8F)) {
      return false;
    }
    i += length;
  }
  return true;
}

// ---- a connection ----------------------------------------------------------

struct Disconnected {}; // the peer has closed the connection

class Connection {
public:
  explicit Connection(int fd) : fd_(fd) {}
  ~Connection() { close(fd_); }

  void serve() {
    do {
      read_head();
      ++requests;
      std::printf("demo: %s %s\n", method_.c_str(), target_.c_str());
      respond();
    } while (keep_);
  }

private:
  void fill() {
    char block[65536];
    const auto n = recv(fd_, block, sizeof(block), 0);
    if (n > 0) {
      input_.append(block, static_cast<std::size_t>(n));
    } else if (n == 0 || errno != EINTR) {
      throw Disconnected();
    }
  }

  std::string take(std::size_t n) {
    while (input_.size() < n) {
      fill();
    }
    auto data = input_.substr(0, n);
    input_.erase(0, n);
    return data;
  }

  void send(std::string_view data) {
    while (!data.empty()) {
      const auto n = ::send(fd_, data.data(), data.size(), MSG_NOSIGNAL);
      if (n > 0) {
        data.remove_prefix(static_cast<std::size_t>(n));
      } else if (errno != EINTR) {
        throw Disconnected();
      }
    }
  }

  void read_head() {
    std::size_t end;
    while ((end = input_.find("\r\n\r\n")) == std::string::npos) {
      if (input_.size() > max_head) { throw Disconnected(); }
      fill();
    }
    head_ = take(end + 4);
    const auto first = head_.find(' ');
    const auto second = head_.find(' ', first + 1);
    if (second == std::string::npos) { throw Disconnected(); }
    method_ = head_.substr(0, first);
    target_ = head_.substr(first + 1, second - first - 1);
    keep_ = strcasecmp(header("Connection").c_str(), "close") != 0 &&
            head_.compare(second, 9, " HTTP/1.0") != 0;
  }

  std::string header(const std::string &name) const {
    for (auto at = head_.find("\r\n"); at + 4 < head_.size();
         at = head_.find("\r\n", at + 2)) {
      const auto *line = head_.c_str() + at + 2;
      if (strncasecmp(line, (name + ":").c_str(), name.size() + 1) == 0) {
        line += name.size() + 1;
        line += std::strspn(line, " \t");
        return std::string(line, std::strcspn(line, "\r"));
      }
    }
    return {};
  }

  void respond(const std::string &status, const std::string &type,
               const std::string &body, const std::string &lines = "") {
    send("HTTP/1.1 " + status + "\r\nContent-Type: " + type +
         "; charset=utf-8\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n" + lines + (keep_ ? "" : "Connection: close\r\n") + "\r\n" +
         (method_ == "HEAD" ? "" : body));
  }

  void respond() {
    const auto size =
        std::strtoull(header("Content-Length").c_str(), nullptr, 10);
    if (size > max_form || !header("Transfer-Encoding").empty()) {
      keep_ = false;
      return respond("413 Content Too Large", "text/plain", "Too large.\n");
    }
    const auto body = take(static_cast<std::size_t>(size));
    const auto path = target_.substr(0, target_.find('?'));
    const bool posted = path == "/hello";
    if (posted ? method_ != "POST" : method_ != "GET" && method_ != "HEAD") {
      respond("405 Method Not Allowed", "text/plain", "Method not allowed.\n",
              posted ? "Allow: POST\r\n" : "Allow: GET, HEAD\r\n");
    } else if (path == "/") {
      auto html = replaced(page, "{boot}", seconds(booted_in));
      html = replaced(html, "{requests}", std::to_string(requests));
      respond("200 OK", "text/html",
              replaced(html, "{pid}", std::to_string(getpid())),
              "Cache-Control: no-cache\r\n");
    } else if (path == "/style.css") {
      respond("200 OK", "text/css", style);
    } else if (path == "/app.js") {
      respond("200 OK", "text/javascript", script);
    } else if (posted) {
      respond(
          "200 OK", "text/html",
          replaced(hello, "{name}", html_escaped(form_field(body, "name"))));
    } else if (path == "/events") {
      stream_events();
    } else if (path == "/echo") {
      open_websocket();
    } else {
      respond("404 Not Found", "text/plain", "Not found.\n");
    }
  }

  void stream_events() {
    send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
         "Cache-Control: no-store\r\nTransfer-Encoding: chunked\r\n\r\n");
    pollfd leaves = {fd_, POLLRDHUP, 0};
    do {
      char event[64], chunk[96];
      const auto n =
          std::snprintf(event, sizeof(event), "data: %.0f\n\n", age());
      std::snprintf(chunk, sizeof(chunk), "%x\r\n%s\r\n",
                    static_cast<unsigned>(n), event);
      send(chunk);
    } while (poll(&leaves, 1, 1000) == 0);
    keep_ = false;
  }

  // ---- RFC 6455

  enum Opcode { more = 0, text = 1, binary = 2, bye = 8, ping = 9, pong = 10 };

  void open_websocket() {
    keep_ = false;
    const auto key = header("Sec-WebSocket-Key");
    if (key.empty() ||
        strcasecmp(header("Upgrade").c_str(), "websocket") != 0 ||
        header("Sec-WebSocket-Version") != "13") {
      return respond("426 Upgrade Required", "text/plain",
                     "This is a WebSocket endpoint.\n",
                     "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n");
    }
    send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
         "Connection: Upgrade\r\nSec-WebSocket-Accept: " +
         base64(sha1(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) +
         "\r\n\r\n");
    std::string message;
    int kind = 0; // of the message being assembled
    while (one_frame(message, kind)) {}
    shutdown(fd_, SHUT_WR);
  }

  void frame(int opcode, const std::string &payload) {
    std::string head(1, static_cast<char>(0x80 | opcode));
    int length_bytes = 0;
    if (payload.size() < 126) {
      head += static_cast<char>(payload.size());
    } else {
      length_bytes = payload.size() < 65536 ? 2 : 8;
      head += static_cast<char>(length_bytes == 2 ? 126 : 127);
    }
    while (length_bytes-- > 0) {
      head += static_cast<char>(static_cast<std::uint64_t>(payload.size()) >>
                                length_bytes * 8);
    }
    send(head + payload);
  }

  bool refuse(int code) {
    frame(bye, {static_cast<char>(code >> 8), static_cast<char>(code)});
    return false;
  }

  bool one_frame(std::string &message, int &kind) {
    const auto head = take(2);
    const auto first = static_cast<std::uint8_t>(head[0]);
    const auto second = static_cast<std::uint8_t>(head[1]);
    const bool last = first & 0x80, masked = second & 0x80;
    const int opcode = first & 15;
    const bool control = opcode >= 8;
    std::uint64_t size = second & 127;
    if (first & 0x70 || !masked || (control && (!last || size > 125))) {
      return refuse(1002);
    }
    if (size >= 126) {
      const auto bytes = take(size == 126 ? 2 : 8);
      size = 0;
      for (auto b : bytes) {
        size = size << 8 | static_cast<std::uint8_t>(b);
      }
    }
    if (size > max_message || message.size() + size > max_message) {
      return refuse(1009);
    }
    const auto mask = take(4);
    auto payload = take(static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < payload.size(); ++i) {
      payload[i] = static_cast<char>(payload[i] ^ mask[i % 4]);
    }

    switch (opcode) {
    case ping: frame(pong, payload); return true;
    case pong: return true;
    case bye: return closed(payload);
    case text:
    case binary:
      if (kind != 0) { return refuse(1002); }
      kind = opcode;
      break;
    case more:
      if (kind == 0) { return refuse(1002); }
      break;
    default: return refuse(1002);
    }
    message += payload;
    if (last) {
      if (kind == text && !is_utf8(message)) { return refuse(1007); }
      frame(kind, message);
      message.clear();
      kind = 0;
    }
    return true;
  }

  bool closed(const std::string &payload) {
    if (payload.empty()) {
      frame(bye, {});
      return false;
    }
    if (payload.size() == 1) { return refuse(1002); }
    const int code = static_cast<std::uint8_t>(payload[0]) << 8 |
                     static_cast<std::uint8_t>(payload[1]);
    const bool known = (code >= 1000 && code <= 1014 && code != 1004 &&
                        code != 1005 && code != 1006) ||
                       (code >= 3000 && code < 5000);
    if (!known) { return refuse(1002); }
    return refuse(is_utf8(payload.substr(2)) ? code : 1007);
  }

  int fd_;
  std::string input_, head_, method_, target_;
  bool keep_ = true;
};

[[noreturn]] void fail(const char *what) {
  std::fprintf(stderr, "demo: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

} // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  signal(SIGTERM, [](int) {
    const char line[] = "demo: stopping on SIGTERM\n";
    if (write(1, line, sizeof(line) - 1) < 0) { _exit(1); }
    _exit(0);
  });

  const auto *port = std::getenv("PORT");
  const auto *boot = std::getenv("DEMO_BOOT_MS");
  const std::chrono::milliseconds boot_time(boot ? std::atoi(boot) : boot_ms);
  std::printf("demo: booting, which takes %s\n",
              seconds(static_cast<double>(boot_time.count()) / 1000).c_str());
  std::this_thread::sleep_for(boot_time);

  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port =
      htons(static_cast<std::uint16_t>(port ? std::atoi(port) : 8080));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (listener < 0 ||
      bind(listener, reinterpret_cast<sockaddr *>(&address), sizeof(address)) !=
          0 ||
      listen(listener, 1024) != 0) {
    fail("cannot listen");
  }
  booted_in = age();
  std::printf("demo: up on port %d after %s\n", ntohs(address.sin_port),
              seconds(booted_in).c_str());

  for (;;) {
    const int fd = accept(listener, nullptr, nullptr);
    if (fd < 0) { continue; }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    std::thread([fd] {
      try {
        Connection(fd).serve();
      } catch (const Disconnected &) {}
    }).detach();
  }
}
