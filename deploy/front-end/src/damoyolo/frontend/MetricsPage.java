package damoyolo.frontend;

import io.netty.buffer.ByteBuf;
import io.netty.buffer.ByteBufOutputStream;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpVersion;
import io.netty.handler.codec.http.QueryStringDecoder;
import io.prometheus.client.Collector.MetricFamilySamples;
import io.prometheus.client.CollectorRegistry;
import io.prometheus.client.exporter.common.TextFormat;
import java.io.IOException;
import java.io.OutputStreamWriter;
import java.io.Writer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.workflow.WorkflowException;
import org.pytorch.serve.http.HttpRequestHandlerChain;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.WorkerInitializationException;

/** In place of TorchServe's PrometheusMetricsRequestHandler: the same page, with the metrics of the workers put in order. */
public final class MetricsPage extends HttpRequestHandlerChain {
    @Override
    public void handleRequest(
            ChannelHandlerContext context, FullHttpRequest request, QueryStringDecoder uri, String[] segments)
            throws ModelException, DownloadArchiveException, WorkflowException, WorkerInitializationException {
        if (segments.length < 2 || !"metrics".equals(segments[1])) {
            chain.handleRequest(context, request, uri, segments);
            return;
        }
        ByteBuf page = context.alloc().buffer();
        try (Writer writer = new OutputStreamWriter(new ByteBufOutputStream(page), StandardCharsets.UTF_8)) {
            Set<String> names = new HashSet<>(uri.parameters().getOrDefault("name[]", List.of()));
            TextFormat.write004(writer, Collections.enumeration(only(names, families())));
        } catch (IOException | RuntimeException error) {
            page.release();
            throw new ModelException(ErrorAnswer.describe(error), error);
        }
        FullHttpResponse answer = new DefaultFullHttpResponse(HttpVersion.HTTP_1_1, HttpResponseStatus.OK, page);
        answer.headers().set(HttpHeaderNames.CONTENT_TYPE, TextFormat.CONTENT_TYPE_004);
        NettyUtils.sendHttpResponse(context, answer, true);
    }

    private static List<MetricFamilySamples> families() {
        ServerMetrics.begin();
        return new WorkerMetrics().arrange(Collections.list(CollectorRegistry.defaultRegistry.metricFamilySamples()));
    }

    /** The families that have samples with one of the names, and of these only such samples; all of them without names. */
    private static List<MetricFamilySamples> only(Set<String> names, List<MetricFamilySamples> families) {
        if (names.isEmpty()) {
            return families;
        }
        List<MetricFamilySamples> chosen = new ArrayList<>();
        for (MetricFamilySamples family : families) {
            List<MetricFamilySamples.Sample> samples = new ArrayList<>(family.samples);
            samples.removeIf(sample -> !names.contains(sample.name));
            if (!samples.isEmpty()) {
                chosen.add(new MetricFamilySamples(family.name, family.type, family.help, samples));
            }
        }
        return chosen;
    }
}
