// The RPC with amqplib, its callback API (the promises cost it a tenth): a process for each worker, since one process is
// one thread. amqplib sets TCP_NODELAY only when asked to. See ../README.md for the arguments.
'use strict';
const amqp = require('amqplib/callback_api');
const cluster = require('cluster');

function check(error) {
  if (error) {
    console.error(String(error));
    process.exit(1);
  }
}

function open(url, then) {
  amqp.connect(url, { noDelay: true }, (error, connection) => {
    check(error);
    connection.on('error', check);
    connection.createChannel((error, channel) => {
      check(error);
      then(channel);
    });
  });
}

function fib(n) {
  return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

function work(url, queue, ready) {
  open(url, (channel) => {
    channel.assertQueue(queue, { durable: false });
    channel.prefetch(1);
    const answer = (request) => {
      const { replyTo, correlationId } = request.properties;
      const body = Buffer.from(String(fib(parseInt(request.content.toString(), 10))));
      channel.sendToQueue(replyTo, body, { correlationId, contentType: 'text/plain' });
      channel.ack(request);
    };
    channel.consume(queue, answer, {}, (error) => {
      check(error);
      ready();
    });
  });
}

function server(url, queue, workers) {
  if (cluster.isWorker) {
    work(url, queue, () => process.send('ready'));
    return;
  }
  let ready = 0;
  for (let i = 0; i < workers; i++) {
    cluster.fork().on('message', () => {
      ready += 1;
      if (ready === workers) console.log('ready');
    });
  }
}

function client(url, queue, requests, inFlight) {
  setTimeout(() => check('no answer'), 300000).unref();
  open(url, (channel) => {
    channel.assertQueue('', { exclusive: true, autoDelete: true }, (error, { queue: callback }) => {
      check(error);
      const open = new Set();
      let [left, sent, answered, begin, warm] = [Math.floor(requests / 10) + 1, 0, 0, process.hrtime.bigint(), false];
      const body = Buffer.from('1');
      const fill = () => {
        while (sent < left && sent - answered < inFlight) {
          const correlationId = String(sent);
          open.add(correlationId);
          channel.sendToQueue(queue, body, { correlationId, replyTo: callback, contentType: 'text/plain' });
          sent += 1;
        }
      };
      const take = (reply) => {
        if (!open.delete(reply.properties.correlationId) || reply.content.toString() !== '1') check('a wrong answer');
        answered += 1;
        if (answered === left && warm) {
          console.log((Number(process.hrtime.bigint() - begin) / 1e9).toFixed(6));
          process.exit(0);
        }
        if (answered === left) [left, sent, answered, begin, warm] = [requests, 0, 0, process.hrtime.bigint(), true];
        fill();
      };
      channel.consume(callback, take, { noAck: true }, (error) => {
        check(error);
        begin = process.hrtime.bigint();
        fill();
      });
    });
  });
}

const [role, url, queue, ...numbers] = process.argv.slice(2);
if (role === 'server' && numbers.length === 1) server(url, queue, Number(numbers[0]));
else if (role === 'client' && numbers.length === 2) client(url, queue, Number(numbers[0]), Number(numbers[1]));
else check('see bench/peers/README.md');
