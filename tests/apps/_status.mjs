// The status as JSON and as Prometheus metrics.

import {
  ask, assert, build, command, fs, path, scratch, spawn, start, test, until
} from './_support.mjs';

const demo = {
  binary : path.join(build, 'demo'),
  env : { DEMO_BOOT_MS : '0' }
};
const status_path = '/-/warmproxy';

async function metrics(warm, request = { path : `${status_path}?format=prometheus` }) {
  const answer = await ask(warm.port, request);
  assert.equal(answer.status, 200);
  assert.match(answer.header('Content-Type'), /^text\/plain; *version=0\.0\.4/);
  const values = {};
  for (const line of answer.text.trim().split('\n')) {
    if (line.startsWith('#')) { continue; }
    const [ , name, value ] = /^(\w+(?:\{.*\})?) (\S+)$/.exec(line);
    values[name] = Number(value);
  }
  return { text : answer.text, values };
}

function checked(text) {
  const done = command('promtool', [ 'check', 'metrics' ],
                       { input : text, any_status : true });
  assert.equal(done.stdout + done.stderr, '');
  assert.equal(done.status, 0);
}

export default async function() {
  const warm = await start(demo);

  await test('status: reading it does not start the target', async () => {
    for (let i = 0; i < 5; i++) { await warm.status(); }
    const cold = await warm.status();
    assert.equal(cold.state, 'cold');
    assert.equal(cold.starts, 0);
    assert.equal(cold.pid, 0);
    assert.equal(cold.requests, 0);
    assert.equal(cold.last_exit, '');
    checked((await metrics(warm)).text);
  });

  await test('status: state of the target', async () => {
    for (let i = 0; i < 3; i++) { await ask(warm.port); }
    const up = await warm.status();
    assert.equal(up.state, 'up');
    assert.equal(up.port, warm.target_port);
    assert.equal(fs.readlinkSync(`/proc/${up.pid}/exe`),
                 fs.realpathSync(demo.binary));
    assert.equal(up.starts, 1);
    assert.equal(up.requests, 3);
    assert.equal(up.in_flight, 0);
    assert.ok(up.connections >= 1);
    process.kill(up.pid, 'SIGKILL');
    const after = await until('the exit is noticed', async () => {
      const status = await warm.status();
      return status.state === 'cold' && status;
    });
    assert.match(after.last_exit, /KILL|9/);
    assert.equal(after.pid, 0);
    assert.equal((await ask(warm.port)).status, 200);
    assert.equal((await warm.status()).starts, 2);
  });

  await test('status: promtool accepts the metrics', async () => {
    const stream = await ask(warm.port, { path : '/events', stream : true });
    const { text, values } = await metrics(warm);
    checked(text);
    const json = await warm.status();
    assert.equal(values.warmproxy_target_up, 1);
    assert.equal(values.warmproxy_target_starts_total, json.starts);
    assert.equal(values.warmproxy_requests_total, json.requests);
    assert.equal(values.warmproxy_requests_in_flight, 1);
    stream.call.destroy();
    const asked = await metrics(warm, {
      path : status_path,
      headers : [ [ 'Accept', 'text/plain; version=0.0.4' ] ]
    });
    assert.deepEqual(Object.keys(asked.values), Object.keys(values));
    for (const name of Object.keys(values)) {
      assert.ok(text.includes(`# HELP ${name} `), name);
      assert.match(text, new RegExp(`# TYPE ${name} (gauge|counter)\\n`));
    }
  });

  await test('status: Prometheus scrapes the metrics', async () => {
    const dir = scratch();
    fs.writeFileSync(path.join(dir, 'prometheus.yml'), `
      scrape_configs:
        - job_name: warmproxy
          scrape_interval: 200ms
          scrape_timeout: 200ms
          metrics_path: ${status_path}
          static_configs: [{targets: ['127.0.0.1:${warm.port}']}]
    `);
    const reader = await start({
      binary : 'prometheus',
      args : [ `--config.file=${dir}/prometheus.yml`,
               `--storage.tsdb.path=${dir}/data`,
               '--web.listen-address=127.0.0.1:{port}' ]
    });
    const value = await until('a value', async () => {
      const { data } = (await ask(reader.port, {
        path : '/api/v1/query?query=warmproxy_target_starts_total'
      })).json;
      return data.result[0]?.value[1];
    });
    assert.equal(value, '2');
    await reader.stop();
  });

  await test('status: reading it does not prevent idle_stop', async () => {
    const idle = await start(demo, { idle_stop : '400ms' });
    assert.equal((await ask(idle.port)).status, 200);
    await until('the target is stopped',
                async () => (await idle.status()).state === 'cold');
    assert.equal((await ask(idle.port)).status, 200);
    assert.equal((await idle.status()).starts, 2);
    await idle.stop();
  });
}
