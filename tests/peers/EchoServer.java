import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.RpcServer;

/** A server of any bodies, by the class RpcServer of RabbitMQ's Java client: the reply is the request.
 *
 * <p>Usage: java -cp amqp-client.jar:slf4j-api.jar EchoServer.java URL QUEUE
 */
public class EchoServer {
    public static void main(String[] args) throws Exception {
        ConnectionFactory factory = new ConnectionFactory();
        factory.setUri(args[0]);
        Channel channel = factory.newConnection().createChannel();
        channel.queueDeclare(args[1], false, false, false, null);
        RpcServer server = new RpcServer(channel, args[1]) {
            @Override
            public byte[] handleCall(byte[] body, AMQP.BasicProperties reply) {
                return body;
            }
        };
        System.out.println(" [x] Awaiting RPC requests");
        server.mainloop();
    }
}
