// A client as the tutorial has it, for one call: the callback API of amqplib, no options. For the one-shot figures.
//     node tutorial_client.js URL QUEUE N
'use strict';
const amqp = require('amqplib/callback_api');

const [url, queue, n] = process.argv.slice(2);

function check(error) {
  if (error) throw error;
}

amqp.connect(url, (error, connection) => {
  check(error);
  connection.createChannel((error, channel) => {
    check(error);
    channel.assertQueue('', { exclusive: true }, (error, { queue: callback }) => {
      check(error);
      const correlationId = Math.random().toString() + Math.random().toString();
      console.log(' [x] Requesting fib(%d)', n);
      const take = (reply) => {
        if (reply.properties.correlationId !== correlationId) return;
        console.log(' [.] Got %s', reply.content.toString());
        connection.close(() => process.exit(0));
      };
      channel.consume(callback, take, { noAck: true });
      channel.sendToQueue(queue, Buffer.from(n), { correlationId, replyTo: callback });
    });
  });
});
