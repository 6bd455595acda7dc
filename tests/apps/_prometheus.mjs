// Prometheus listens before it is ready and answers 503 until then.

import {
  answers, ask, assert, command, fs, path, pause, same, scratch, start, test, until
} from './_support.mjs';

/**
 * Prometheus reads its configuration once to begin and once more right before
 * it is ready. From a FIFO, it is ready only when the test says so.
 */
function gated() {
  const dir = scratch();
  const config = path.join(dir, 'prometheus.yml');
  command('mkfifo', [ config ]);
  return {
    target : {
      binary : 'prometheus',
      args : [
        `--config.file=${config}`, `--storage.tsdb.path=${dir}/data`,
        '--web.listen-address=127.0.0.1:{port}'
      ]
    },
    read_config : () => fs.promises.writeFile(
        config, 'global: {scrape_interval: 1h}\n')
  };
}

const query = '/api/v1/query?query=vector(1)&time=1700000000';

export default async function() {
  let warm;

  await test('prometheus: the first request waits while it answers 503', async () => {
    const { target, read_config } = gated();
    warm = await start(target);
    let first;
    const asked = ask(warm.port, { path : query });
    asked.then((answer) => first = answer, () => {});
    await read_config();
    const direct = () => ask(warm.target_port, { path : query })
                             .then((answer) => answer.status, () => 0);
    await until('Prometheus listens', async () => await direct() === 503);
    // Long enough for many probes.
    for (let i = 0; i < 40; i++) {
      assert.equal(await direct(), 503);
      assert.equal(first, undefined,
                   `answered ${first && first.status} too early`);
      await pause(25);
    }
    await read_config();
    first = await asked;
    assert.equal(first.status, 200);
    assert.equal(first.json.data.result[0].value[1], '1');
    assert.match(first.header('Server-Timing'), /^warmproxy;/);
  });

  await test('prometheus: readiness by its own health path', async () => {
    const { target, read_config } = gated();
    const other = await start(target, { health_path : '/-/ready' });
    const asked = ask(other.port, { path : query });
    await read_config();
    await until('Prometheus listens', () => answers(other.target_port));
    await read_config();
    assert.equal((await asked).status, 200);
    await other.stop();
  });

  await test('prometheus: queries by GET and POST', async () => {
    const answer = await same(warm, { path : query });
    assert.equal(answer.json.status, 'success');
    const form = 'query=vector%281%29+%2B+2&time=1700000000';
    const posted = await same(warm, {
      method : 'POST',
      path : '/api/v1/query',
      headers : [ [ 'Content-Type', 'application/x-www-form-urlencoded' ] ],
      body : form
    });
    assert.equal(posted.json.data.result[0].value[1], '3');
    const packed = await same(
        warm, { path : query, headers : [ [ 'Accept-Encoding', 'gzip' ] ] });
    assert.equal(packed.header('Content-Encoding'), 'gzip');
    assert.equal((await same(warm, { path : '/api/v1/query?query=(' })).status,
                 400);
    await same(warm, {
      method : 'OPTIONS',
      path : '/api/v1/query',
      headers : [ [ 'Origin', 'http://a.example' ] ]
    });
  });

  await test('prometheus: metrics', async () => {
    // Their values move on, and each request adds some; their kinds stay.
    const kinds = (answer) => {
      answer.body = answer.body.match(/^# .*$/gm).join('\n');
      answer.headers =
          answer.headers.filter(([ name ]) => name !== 'Content-Length');
    };
    const answer = await same(warm, { path : '/metrics' }, kinds);
    assert.equal(answer.status, 200);
    assert.match(answer.text, /^prometheus_build_info\{/m);
  });

  await test('prometheus: pages and redirects', async () => {
    assert.equal((await same(warm, { path : '/' })).status, 302);
    await same(warm, { path : '/graph' });
    await same(warm, { path : '/classic/graph' });
    assert.equal((await same(warm, { path : '/nowhere' })).status, 404);
  });
}
