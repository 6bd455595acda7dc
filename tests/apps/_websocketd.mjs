// websocketd: a program's lines as WebSocket messages.

import {
  ask, assert, fs, path, same, scratch, start, test, until
} from './_support.mjs';
import { same_talk, talk } from './_sockets.mjs';

export default async function() {
  const root = scratch();
  fs.writeFileSync(path.join(root, 'index.html'), '<!doctype html>static');
  const lines = await start({
    binary : 'websocketd',
    args : [ '--address=127.0.0.1', '--port={port}', `--staticdir=${root}`,
             'cat' ]
  });

  await test('websocketd: a WebSocket as the first request', async () => {
    const record = await talk(lines.port, '/', async (socket, { messages }) => {
      socket.send('first');
      await messages(1);
      socket.close(1000);
    });
    assert.deepEqual(record.at(-2), [ 'text', 'first' ]);
    assert.equal((await lines.status()).starts, 1);
  });

  await test('websocketd: text and fragmented messages', async () => {
    await same_talk(lines, '/', async (socket, { messages, kinds }) => {
      socket.send('one');
      socket.send('two ü €');
      await messages(2);
      socket.send('in ', { fin : false });
      socket.send('parts', { fin : true });
      await messages(3);
      socket.ping('still there?');
      await kinds('pong');
      socket.close(4000, 'enough');
    });
  });

  await test('websocketd: a message of a megabyte', async () => {
    await same_talk(lines, '/', async (socket, { messages }) => {
      socket.send('x'.repeat(1 << 20));
      await messages(1);
      socket.close(1000);
    });
  });

  await test('websocketd: closed when the program exits', async () => {
    const clock = await start({
      binary : 'websocketd',
      args : [ '--address=127.0.0.1', '--port={port}', 'seq', '3' ]
    });
    const record = await same_talk(clock, '/');
    assert.deepEqual(record.filter(([ kind ]) => kind === 'text').map((line) => line[1]),
                     [ '1', '2', '3' ]);
    await clock.stop();
  });

  await test('websocketd: binary messages', async () => {
    const bytes = await start({
      binary : 'websocketd',
      args : [ '--address=127.0.0.1', '--port={port}', '--binary', 'cat' ]
    });
    // websocketd reads the next output over the one that it still sends, so
    // only one small message at a time is certain to come back whole.
    await same_talk(bytes, '/', async (socket, { messages }) => {
      for (let i = 1; i <= 50; i++) {
        socket.send(Buffer.alloc(150, Buffer.from([ 0, 10, 255, 13, i ])));
        await messages(i);
      }
      socket.close(1000);
    });
    await bytes.stop();
  });

  await test('websocketd: plain pages and a refused upgrade', async () => {
    assert.equal((await same(lines, { path : '/' })).status, 200);
    assert.equal((await same(lines, { path : '/nothing' })).status, 404);
    await same(lines, {
      path : '/nothing',
      headers : [
        [ 'Connection', 'Upgrade' ], [ 'Upgrade', 'websocket' ],
        [ 'Sec-WebSocket-Version', '12' ], [ 'Sec-WebSocket-Key', 'bad' ]
      ]
    });
  });

  await test('websocketd: fifty concurrent connections', async () => {
    const records = await Promise.all(Array.from({ length : 50 }, (_, i) => talk(
        lines.port, '/', async (socket, { messages }) => {
          for (let line = 1; line <= 5; line++) {
            socket.send(`${i}.${line}`);
            await messages(line);
          }
          socket.close(1000);
        })));
    records.forEach((record, i) => assert.deepEqual(
        record.filter(([ kind ]) => kind === 'text').map((line) => line[1]),
        [ 1, 2, 3, 4, 5 ].map((line) => `${i}.${line}`)));
    await until('nothing is in flight',
                async () => (await lines.status()).in_flight === 0);
  });
}
