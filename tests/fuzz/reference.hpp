// HTTP/1.1 once more, for the fuzzers to compare with: read in the plainest way
// there is, with copies and searches, and sharing no code with warmproxy.hpp.
// What it says of a message is what RFC 9112 says, less what we refuse.

#ifndef WARMPROXY_TESTS_FUZZ_REFERENCE_HPP
#define WARMPROXY_TESTS_FUZZ_REFERENCE_HPP

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

// Ends the fuzzer, which keeps the input.
#define REQUIRE(condition, what)                                               \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, what);           \
      std::abort();                                                            \
    }                                                                          \
  } while (false)

namespace reference {

using Bytes = std::string_view;

// Portions of a text: small ones and large ones, as `seed` has it.
class Portions {
public:
  explicit Portions(unsigned seed) : state_(seed) {}
  std::size_t next() {
    state_ = state_ * 1103515245u + 12345u;
    const auto n = (state_ >> 16) & 0xff;
    return n < 128 ? 1 + n % 3 : n < 224 ? 1 + n % 32 : 1 + n * 7;
  }

private:
  unsigned state_;
};

inline std::string lower(Bytes text) {
  std::string out(text);
  for (auto &c : out) {
    if (c >= 'A' && c <= 'Z') { c = static_cast<char>(c - 'A' + 'a'); }
  }
  return out;
}

inline Bytes stripped(Bytes text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) {
    text.remove_prefix(1);
  }
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) {
    text.remove_suffix(1);
  }
  return text;
}

// The elements of a comma-separated list, in lower case.
inline std::vector<std::string> elements(Bytes list) {
  std::vector<std::string> all;
  std::string element;
  for (const char c : std::string(list) + ",") {
    if (c != ',') {
      element += c;
      continue;
    }
    const auto bare = stripped(element);
    if (!bare.empty()) { all.push_back(lower(bare)); }
    element.clear();
  }
  return all;
}

inline bool has(const std::vector<std::string> &list, Bytes element) {
  for (const auto &e : list) {
    if (e == element) { return true; }
  }
  return false;
}

// What may stand in a line: no control character but the tab.
inline bool clean(Bytes text) {
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte < 32 && byte != 9) || byte == 127) { return false; }
  }
  return true;
}

inline bool token_chars(Bytes text) {
  return text.find_first_not_of(
             "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
             "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == Bytes::npos;
}
inline bool token(Bytes text) { return !text.empty() && token_chars(text); }

struct Line {
  std::string name, value, raw; // `name` in lower case
};

struct Body {
  enum Kind { none, length, chunked, until_close };
  Kind kind = none;
  std::uint64_t size = 0;
};

struct Head {
  std::string method, target, authority; // of a request
  int status = 0;                        // of a response
  std::string reason;                    // all behind its version
  int minor = 1;
  std::vector<Line> lines;
  Body body;

  std::vector<std::string> values(Bytes name) const {
    std::vector<std::string> all;
    for (const auto &line : lines) {
      if (line.name == name) { all.push_back(line.value); }
    }
    return all;
  }
  // The elements of all these lines.
  std::vector<std::string> list(Bytes name) const {
    std::vector<std::string> all;
    for (const auto &value : values(name)) {
      for (const auto &element : elements(value)) {
        all.push_back(element);
      }
    }
    return all;
  }
  bool keep_alive() const {
    const auto options = list("connection");
    return !has(options, "close") && (minor == 1 || has(options, "keep-alive"));
  }
  bool upgrade() const {
    return minor == 1 && has(list("connection"), "upgrade") &&
           !values("upgrade").empty();
  }
};

// Up to and with the first empty line; empty: there is none. Where `lenient`,
// lines may end in LF alone.
inline Bytes head_of(Bytes bytes, bool lenient) {
  auto end = bytes.find("\r\n\r\n");
  auto size = end == Bytes::npos ? 0 : end + 4;
  if (lenient) {
    for (const Bytes mark : {"\n\n", "\n\r\n"}) {
      end = bytes.find(mark);
      if (end != Bytes::npos && (size == 0 || end + mark.size() < size)) {
        size = end + mark.size();
      }
    }
  }
  return bytes.substr(0, size);
}

// A head's lines without their ends and without the empty one; none if one of
// them does not end as it should, or holds what it must not.
inline std::vector<std::string> lines_of(Bytes head, bool lenient) {
  std::vector<std::string> lines;
  std::string line;
  for (const char c : head) {
    if (c != '\n') {
      line += c;
      continue;
    }
    if (!line.empty() && line.back() == '\r') {
      line.pop_back();
    } else if (!lenient) {
      return {};
    }
    if (!clean(line)) { return {}; }
    lines.push_back(line);
    line.clear();
  }
  if (lines.empty() || !lines.back().empty() || !line.empty()) { return {}; }
  lines.pop_back();
  return lines;
}

inline bool read_lines(const std::vector<std::string> &lines, Head &head) {
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const auto &raw = lines[i];
    const auto colon = raw.find(':');
    if (colon == std::string::npos || !token(Bytes(raw).substr(0, colon))) {
      return false;
    }
    head.lines.push_back({lower(Bytes(raw).substr(0, colon)),
                          std::string(stripped(Bytes(raw).substr(colon + 1))),
                          raw});
  }
  // No target needs more, and each costs.
  return head.lines.size() <= 1000 && head.list("connection").size() <= 100;
}

inline std::optional<std::uint64_t> decimal(Bytes text) {
  if (text.empty() || text.find_first_not_of("0123456789") != Bytes::npos) {
    return {};
  }
  while (text.size() > 1 && text[0] == '0') {
    text.remove_prefix(1);
  }
  const Bytes largest = "18446744073709551615";
  if (text.size() > largest.size() ||
      (text.size() == largest.size() && text > largest)) {
    return {};
  }
  return std::strtoull(std::string(text).c_str(), nullptr, 10);
}

// RFC 9112, section 6.3. False: refused.
inline bool read_framing(bool request, Head &head) {
  const auto codings = head.values("transfer-encoding");
  const auto lengths = head.values("content-length");
  for (const auto &length : lengths) {
    if (!decimal(length) || decimal(length) != decimal(lengths[0])) {
      return false;
    }
  }
  if (!codings.empty()) {
    if (codings.size() > 1 || lower(codings[0]) != "chunked" ||
        head.minor == 0 || (request && !lengths.empty())) {
      return false;
    }
    head.body.kind = Body::chunked;
  } else if (!lengths.empty()) {
    if (request && lengths.size() > 1) { return false; }
    head.body = {Body::length, *decimal(lengths[0])};
  } else {
    head.body.kind = request ? Body::none : Body::until_close;
  }
  return true;
}

// What has to stand in Host, or between "//" and the path.
inline bool authority(Bytes text) {
  return text.find_first_of(" \t,/?#@\\<>\"") == Bytes::npos;
}

inline std::optional<Head> request(Bytes text) {
  const auto lines = lines_of(text, false);
  if (lines.empty()) { return {}; }
  Head head;
  const auto &first = lines[0];
  const auto a = first.find(' ');
  const auto b = a == std::string::npos ? a : first.find(' ', a + 1);
  if (b == std::string::npos || first.find(' ', b + 1) != std::string::npos) {
    return {};
  }
  head.method = first.substr(0, a);
  head.target = first.substr(a + 1, b - a - 1);
  const auto version = first.substr(b + 1);
  if (version != "HTTP/1.1" && version != "HTTP/1.0") { return {}; }
  head.minor = version == "HTTP/1.1" ? 1 : 0;
  if (!token(head.method) || head.method == "CONNECT" ||
      head.target.find_first_of("\t#") != std::string::npos ||
      !read_lines(lines, head)) {
    return {};
  }
  const auto hosts = head.values("host");
  if (hosts.size() > 1 || (hosts.empty() && head.minor == 1) ||
      (!hosts.empty() && !authority(hosts[0]))) {
    return {};
  }
  const auto scheme = lower(head.target).substr(0, 8);
  const auto skip = scheme == "https://"               ? 8u
                    : scheme.substr(0, 7) == "http://" ? 7u
                                                       : 0u;
  if (skip) {
    const auto end =
        std::min(head.target.find_first_of("/?", skip), head.target.size());
    head.authority = head.target.substr(skip, end - skip);
    head.target.erase(0, end);
    if (head.authority.empty() || !authority(head.authority)) { return {}; }
  } else if (head.target.substr(0, 1) != "/" &&
             (head.target != "*" || head.method != "OPTIONS")) {
    return {};
  }
  if (!read_framing(true, head)) { return {}; }
  return head;
}

// `method` is that of the request which it answers.
inline std::optional<Head> response(Bytes text, Bytes method, bool lenient) {
  const auto lines = lines_of(text, lenient);
  if (lines.empty()) { return {}; }
  Head head;
  const auto &first = lines[0];
  const auto version = first.substr(0, 9);
  if (version != "HTTP/1.1 " && version != "HTTP/1.0 ") { return {}; }
  head.minor = version == "HTTP/1.1 " ? 1 : 0;
  head.reason = first.substr(9);
  const auto code = decimal(head.reason.substr(0, 3));
  if (head.reason.size() < 3 || !code || *code < 100 ||
      (head.reason.size() > 3 && head.reason[3] != ' ') ||
      !read_lines(lines, head)) {
    return {};
  }
  head.status = static_cast<int>(*code);
  if (head.status < 200 || head.status == 204) { return head; }
  if (!read_framing(false, head)) { return {}; }
  if (head.status == 304 || method == "HEAD") { head.body = {}; }
  return head;
}

enum class State { more, done, wrong };

// A body as far as it goes: how many of the bytes are its, and what they carry.
struct Decoded {
  State state = State::more;
  std::size_t size = 0;
  std::string content;
};

// Whether something that begins like this can be the line of a chunk's size.
inline bool size_line(Bytes text, bool whole, std::uint64_t &size) {
  auto digits = text.find_first_not_of("0123456789abcdefABCDEF");
  if (digits == Bytes::npos) { digits = text.size(); }
  auto significant = text.substr(0, digits);
  while (!significant.empty() && significant[0] == '0') {
    significant.remove_prefix(1);
  }
  if (significant.size() > 16 ||
      (significant.size() == 16 && significant[0] > '7')) {
    return false;
  }
  size = std::strtoull(std::string(significant).c_str(), nullptr, 16);
  const auto rest = text.substr(digits);
  return (digits > 0 || (!whole && rest.empty())) &&
         (rest.empty() || rest[0] == ';') && clean(rest);
}

// The same of a trailer's line, or of the empty one behind them.
inline bool trailer_line(Bytes text, bool whole) {
  if (text.empty()) { return true; }
  const auto colon = text.find(':');
  if (colon == Bytes::npos) { return !whole && token(text); }
  return token(text.substr(0, colon)) && clean(text.substr(colon));
}

// RFC 9112, section 7.1.
inline Decoded chunked(Bytes bytes) {
  Decoded out;
  const auto ends = [&out](State state, std::size_t size) {
    out.state = state;
    out.size = size;
    return out;
  };
  // The line at `at`, or why there is none: its end is still to come, or it
  // can have none any more.
  std::size_t at = 0;
  const auto line = [&](auto good, Bytes &text) {
    const auto end = bytes.find("\r\n", at);
    text = bytes.substr(at, end == Bytes::npos ? end : end - at);
    const bool whole =
        end != Bytes::npos || (!text.empty() && text.back() == '\r');
    if (end == Bytes::npos && whole) { text.remove_suffix(1); }
    if (!good(text, whole)) { return State::wrong; }
    return end == Bytes::npos ? State::more : State::done;
  };
  Bytes text;
  for (;;) {
    std::uint64_t size = 0;
    const auto state = line(
        [&](Bytes t, bool whole) { return size_line(t, whole, size); }, text);
    if (state != State::done) { return ends(state, bytes.size()); }
    at += text.size() + 2;
    if (size == 0) { break; }
    const auto data = bytes.substr(at, size);
    out.content += data;
    at += data.size();
    const auto end = bytes.substr(at, 2);
    if (data.size() < size || end.empty() || end == "\r") {
      return ends(State::more, bytes.size());
    }
    if (end != "\r\n") { return ends(State::wrong, bytes.size()); }
    at += 2;
  }
  for (;;) {
    const auto state = line(trailer_line, text);
    if (state != State::done) { return ends(state, bytes.size()); }
    at += text.size() + 2;
    if (text.empty()) { return ends(State::done, at); }
  }
}

// The body that such a head announces. What goes until the end of the
// connection is never done.
inline Decoded body(const Body &body, Bytes bytes) {
  switch (body.kind) {
  case Body::none: return {State::done, 0, {}};
  case Body::chunked: return chunked(bytes);
  case Body::length: bytes = bytes.substr(0, body.size); break;
  case Body::until_close: break;
  }
  const bool done = body.kind == Body::length && bytes.size() == body.size;
  return {done ? State::done : State::more, bytes.size(), std::string(bytes)};
}

} // namespace reference

#endif
