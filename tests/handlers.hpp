// Handlers for a ScriptedTarget that several test files use, and the requests
// that go with them.

#ifndef WARMPROXY_TESTS_HANDLERS_HPP
#define WARMPROXY_TESTS_HANDLERS_HPP

#include "support.hpp"

#include <set>

namespace support {

inline const std::string plain = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";
inline const std::string post_head =
    "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n";

// Responds with the request's target and body.
inline ScriptedTarget::Handler telling() {
  return answering_with([](const std::string &head, const std::string &body) {
    const auto begin = head.find(' ') + 1;
    return ok(head.substr(begin, head.find(' ', begin) - begin) + "|" + body);
  });
}

// Responds to the nth request, on whatever connection, as the nth of `scripts`
// says; the last script is used for all further requests.
using Script = std::function<void(TargetConnection &)>;
inline ScriptedTarget::Handler playing(std::vector<Script> scripts) {
  auto next = std::make_shared<std::atomic<std::size_t>>(0);
  return [next, scripts = std::move(scripts)](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      c.read_body(head);
      const auto n = std::min(next->fetch_add(1), scripts.size() - 1);
      scripts[n](c);
      if (c.fd() < 0) { return; }
    }
  };
}
inline Script sending(std::string text) {
  return [text = std::move(text)](TargetConnection &c) { c.send(text); };
}
inline Script sending_and_closing(std::string text) {
  return [text = std::move(text)](TargetConnection &c) {
    c.send(text);
    c.close();
  };
}
inline Script sending_and_resetting(std::string text) {
  return [text = std::move(text)](TargetConnection &c) {
    c.send(text);
    c.reset();
  };
}

// The number of connections on which the target received requests.
inline std::size_t connections_used(const Stage &stage) {
  std::set<std::size_t> numbers;
  for (const auto &request : stage.target.requests()) {
    numbers.insert(request.connection);
  }
  return numbers.size();
}

} // namespace support

#endif
