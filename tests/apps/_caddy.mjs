// Caddy: static files, ranges, large files, compression.

import { gzipSync } from 'node:zlib';
import {
  ask, assert, fs, noise, path, same, scratch, sha256, start, test, until
} from './_support.mjs';

const large = 200 * 1024 * 1024;

function site() {
  const root = scratch();
  const write = (name, content) => {
    const file = path.join(root, name);
    fs.mkdirSync(path.dirname(file), { recursive : true });
    fs.writeFileSync(file, content);
    // Neither now nor a whole second: validators depend on it.
    fs.utimesSync(file, 1700000000.25, 1700000000.25);
  };
  write('hello.txt', 'Hello, warm world.\n');
  write('empty.txt', '');
  write('numbers.txt', Array.from({ length : 5000 }, (_, i) => i).join('\n'));
  write('page.html', `<!doctype html><title>page</title>${'<p>text</p>'.repeat(999)}`);
  write('bundle.js', 'let x = 1;\n'.repeat(500));
  write('bundle.js.gz', gzipSync('let x = 1;\n'.repeat(500)));
  write('folder/index.html', '<!doctype html><p>index');
  write('listed/one.txt', '1');
  write('listed/a b%c é.txt', 'odd name');
  write('listed/two/three.txt', '3');
  const block = noise(1024 * 1024);
  const file = fs.openSync(path.join(root, 'large.bin'), 'w');
  for (let at = 0; at < large; at += block.length) {
    block.writeUInt32BE(at / block.length, 0);
    fs.writeSync(file, block);
  }
  fs.closeSync(file);
  return root;
}

// Every response has another random boundary.
function fixed_boundary(answer) {
  const type = answer.headers.find(([ name ]) => name === 'Content-Type');
  const drawn = /boundary=(\w+)/.exec(type[1])[1];
  type[1] = type[1].replace(drawn, 'B');
  answer.body = answer.body.replaceAll(drawn, 'B');
}

export default async function() {
  const root = site();

  await test('caddy: the first request starts it', async () => {
    const warm = await start({
      binary : 'caddy',
      args : [
        'file-server', '--listen', '127.0.0.1:{port}', '--root', root,
        '--browse'
      ]
    });
    assert.equal((await warm.status()).state, 'cold');
    const cold = await ask(warm.port, { path : '/hello.txt' });
    assert.equal(cold.status, 200);
    assert.equal(cold.text, 'Hello, warm world.\n');
    assert.match(cold.header('Server-Timing'), /^warmproxy;desc="cold start"/);
    const second = await same(warm, { path : '/hello.txt' });
    assert.equal(second.header('Server-Timing'), undefined);
    const status = await warm.status();
    assert.equal(status.state, 'up');
    assert.equal(status.starts, 1);
    await warm.stop();
  });

  const caddyfile = path.join(root, '.Caddyfile');
  fs.writeFileSync(caddyfile, `
    {
      admin off
      auto_https off
    }
    http://:{$PORT} {
      bind 127.0.0.1
      root * "${root}"
      redir /old /hello.txt?from=old
      redir /away https://example.com/there 308
      respond /teapot "short and stout" 418
      header /cookies +Set-Cookie "a=%20b; Path=/"
      header /cookies +Set-Cookie "c=d; HttpOnly"
      respond /cookies "two"
      encode gzip
      file_server browse {
        precompressed gzip
      }
    }
  `);
  const warm = await start({
    binary : 'caddy',
    args : [ 'run', '--config', caddyfile, '--adapter', 'caddyfile' ]
  });
  await ask(warm.port);

  const get = (path, ...headers) => ({ path, headers });

  await test('caddy: whole files', async () => {
    assert.equal((await same(warm, get('/hello.txt'))).status, 200);
    assert.equal((await same(warm, get('/empty.txt'))).body.length, 0);
    assert.equal((await same(warm, get('/page.html'))).status, 200);
    assert.equal((await same(warm, get('/folder/'))).status, 200);
  });

  await test('caddy: a single range', async () => {
    for (const range of ['bytes=0-99', 'bytes=100-100', 'bytes=-7',
                         'bytes=20000-', 'bytes=0-999999']) {
      const answer = await same(warm, get('/numbers.txt', [ 'Range', range ]));
      assert.equal(answer.status, 206, range);
      assert.match(answer.header('Content-Range'), /^bytes \d+-\d+\/\d+$/);
    }
  });

  await test('caddy: several ranges', async () => {
    for (const range of ['bytes=0-0,-1', 'bytes=0-99,200-299, 1000-1001']) {
      const answer = await same(
          warm, get('/numbers.txt', [ 'Range', range ]), fixed_boundary);
      assert.equal(answer.status, 206);
      assert.match(answer.header('Content-Type'), /^multipart\/byteranges/);
    }
  });

  await test('caddy: If-Range', async () => {
    const whole = await ask(warm.port, get('/numbers.txt'));
    const range = [ 'Range', 'bytes=5-9' ];
    const tag = whole.header('ETag');
    const date = whole.header('Last-Modified');
    assert.ok(tag && date);
    const ask_if = async (value) =>
        (await same(warm, get('/numbers.txt', range, [ 'If-Range', value ])))
            .status;
    assert.equal(await ask_if(tag), 206);
    assert.equal(await ask_if('"another"'), 200);
    assert.equal(await ask_if(date), 206);
    assert.equal(await ask_if('Thu, 01 Jan 1970 00:00:00 GMT'), 200);
  });

  await test('caddy: unsatisfiable and invalid ranges', async () => {
    for (const range of ['bytes=999999-', 'bytes=9-1', 'bytes=a-b', 'lines=1-2',
                         'bytes=']) {
      await same(warm, get('/numbers.txt', [ 'Range', range ]));
    }
    const answer =
        await same(warm, get('/numbers.txt', [ 'Range', 'bytes=999999-' ]));
    assert.equal(answer.status, 416);
  });

  await test('caddy: HEAD', async () => {
    for (const path of ['/hello.txt', '/empty.txt', '/nowhere', '/listed/']) {
      const answer = await same(warm, { method : 'HEAD', path });
      assert.equal(answer.body.length, 0);
    }
    const answer = await same(warm, { method : 'HEAD', path : '/large.bin' });
    assert.equal(answer.header('Content-Length'), String(large));
  });

  await test('caddy: conditional requests', async () => {
    const whole = await ask(warm.port, get('/hello.txt'));
    for (const condition of [
      [ 'If-None-Match', whole.header('ETag') ], [ 'If-None-Match', '*' ],
      [ 'If-Modified-Since', whole.header('Last-Modified') ]
    ]) {
      assert.equal((await same(warm, get('/hello.txt', condition))).status, 304);
    }
    assert.equal((await same(warm, get('/hello.txt', [ 'If-Match', '"x"' ])))
                     .status, 412);
  });

  await test('caddy: compressed responses and precompressed files', async () => {
    const packed = [ 'Accept-Encoding', 'gzip, br' ];
    const page = await same(warm, get('/page.html', packed));
    assert.equal(page.header('Content-Encoding'), 'gzip');
    const script = await same(warm, get('/bundle.js', packed));
    assert.equal(script.header('Content-Encoding'), 'gzip');
    assert.equal(sha256(script.body),
                 sha256(fs.readFileSync(path.join(root, 'bundle.js.gz'))));
    await same(warm, get('/bundle.js', packed, [ 'Range', 'bytes=3-30' ]));
    await same(warm, { method : 'HEAD', path : '/page.html', headers : [ packed ] });
    const plain = await same(warm, get('/bundle.js'));
    assert.equal(plain.header('Content-Encoding'), undefined);
  });

  await test('caddy: directory listings', async () => {
    const listing = await same(warm, get('/listed/'));
    assert.match(listing.text, /one\.txt/);
    const json = await same(warm, get('/listed/', [ 'Accept', 'application/json' ]));
    assert.ok(json.json.length >= 3);
    await same(warm, get('/listed/?sort=size&order=desc'));
  });

  await test('caddy: redirects, errors, other methods, unusual paths', async () => {
    assert.equal((await same(warm, get('/old'))).status, 302);
    assert.equal((await same(warm, get('/away'))).status, 308);
    assert.equal((await same(warm, get('/folder'))).status, 308);
    assert.equal((await same(warm, get('/nowhere'))).status, 404);
    assert.equal((await same(warm, get('/teapot'))).status, 418);
    assert.deepEqual((await same(warm, get('/cookies'))).all('Set-Cookie'),
                     [ 'a=%20b; Path=/', 'c=d; HttpOnly' ]);
    for (const method of ['POST', 'PUT', 'DELETE', 'PURGE', 'OPTIONS']) {
      await same(warm, { method, path : '/hello.txt', body : 'ignored' });
    }
    for (const path of ['//hello.txt', '/./hello.txt', '/listed/../hello.txt',
                        '/%68ello.txt', '/hello.txt?', '/hello.txt?a=%2F&b=+;',
                        '/listed/a%20b%25c%20%C3%A9.txt', '/listed%2Fone.txt',
                        '/%FF', '/hello.txt/']) {
      await same(warm, get(path));
    }
  });

  await test('caddy: 200 MB in constant memory', async () => {
    const before = warm.memory_kb();
    const direct =
        await ask(warm.target_port, { path : '/large.bin', digest : true });
    const through =
        await ask(warm.port, { path : '/large.bin', digest : true });
    assert.equal(through.text, direct.text);
    assert.ok(through.text.startsWith(`${large} bytes`));
    const grown = warm.memory_kb() - before;
    assert.ok(grown < 20000, `grew by ${grown} KB`);
  });

  await test('caddy: 200 MB in 64 concurrent ranges', async () => {
    const part = Math.ceil(large / 64);
    const parts = await Promise.all(Array.from({ length : 64 }, (_, i) => ask(
        warm.port,
        get('/large.bin', [ 'Range',
                            `bytes=${i * part}-${(i + 1) * part - 1}` ]))));
    assert.ok(parts.every((answer) => answer.status === 206));
    assert.equal(
        sha256(Buffer.concat(parts.map((answer) => answer.body))),
        sha256(fs.readFileSync(path.join(root, 'large.bin'))));
  });

  await test('caddy: a download aborted by the client is aborted at the target',
             async () => {
    const answer = await ask(warm.port, { path : '/large.bin', stream : true });
    await new Promise((done) => answer.message.once('data', done));
    assert.equal((await warm.status()).in_flight, 1);
    answer.call.destroy();
    await until('nothing is in flight',
                async () => (await warm.status()).in_flight === 0);
    assert.equal((await same(warm, get('/hello.txt'))).status, 200);
  });
}
