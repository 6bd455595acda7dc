// Load on a proxy that is a process of its own, and what it costs at rest.

#ifndef WARMPROXY_TESTS_LOAD_HPP
#define WARMPROXY_TESTS_LOAD_HPP

#include "figures.hpp"

namespace support {

inline const std::string get_pid = "GET /pid HTTP/1.1\r\nHost: test\r\n\r\n";

inline Environment served(const std::string &connections = "4000") {
  auto environment = serve_fake();
  environment["WARMPROXY_MAX_CONNECTIONS"] = connections;
  // A stopped target has no idle connections, which would be counted.
  environment["WARMPROXY_IDLE_STOP"] = "100ms";
  return environment;
}

// Whether `clients` concurrent clients get `requests` good responses each.
inline bool busy(int port, int clients, int requests) {
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < clients; ++i) {
    threads.emplace_back([&] {
      try {
        RawClient client(port);
        for (int n = 0; n < requests; ++n) {
          const auto response = client.get("/bytes?n=1000");
          if (response.status == 200 && response.body.size() == 1000) {
            ++good;
          }
        }
      } catch (const Error &) {}
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
  return good == clients * requests;
}

// What a proxy that has served some clients costs when none is connected.
inline Figures at_rest(Watched &proxy, int clients = 50) {
  CHECK(proxy.alone());
  const auto at_first = proxy.figures();
  CHECK(busy(proxy.port(), clients, 2));
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(at_first));
  return proxy.figures();
}

} // namespace support

#endif
