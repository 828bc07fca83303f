package damoyolo.frontend;

import java.util.Locale;
import java.util.Properties;
import java.util.TreeSet;
import org.pytorch.serve.util.ConfigManager;

/**
 * The keys of config.properties that begin with front_end_, which TorchServe itself ignores: `front_end_` and the
 * name of the constant in lower case. Their values are whole numbers; those that end in _S are seconds.
 */
enum Setting {
    /** After SIGTERM: readiness is false, and new requests are still served. */
    DRAIN_DELAY_S(0, 0, 3600),
    /** After that, new requests are refused; the longest wait for the answers to those accepted. */
    DRAIN_GRACE_S(30, 0, 3600),
    /** The longest time from a complete request to its answer; 0: the model's responseTimeout and 60 s. */
    ANSWER_TIMEOUT_S(0, 0, 86_400),
    /** The longest time from the first byte of a request to the end of its headers. */
    HEADER_TIMEOUT_S(10, 1, 3600),
    /** The longest time for a whole request, and one more second for each 10 kB. */
    REQUEST_TIMEOUT_S(30, 1, 3600),
    /** A connection on which nothing is sent or received for this time is closed. */
    IDLE_TIMEOUT_S(75, 1, 86_400),
    /** A model is ready while its last successful answer is no older than this; 0: loaded workers are enough. */
    HEALTH_WINDOW_S(4, 0, 3600),
    /** The longest wait for the answer to the built-in image. */
    HEALTH_TIMEOUT_S(5, 1, 3600),
    /** How many workers of a model are enough for readiness; 0: its minWorkers. */
    READY_WORKERS(0, 0, 1000);

    private static final String PREFIX = "front_end_";

    private final int least;
    private final int most;
    private int value;

    Setting(int value, int least, int most) {
        this.value = value;
        this.least = least;
        this.most = most;
    }

    /**
     * Reads all settings; called once, before the server has connections.
     *
     * @throws IllegalArgumentException a value is not accepted, or a key that begins with front_end_ is none of these
     */
    static void readAll() {
        Properties properties = ConfigManager.getInstance().getConfiguration();
        TreeSet<String> unknown = new TreeSet<>(properties.stringPropertyNames());
        unknown.removeIf(key -> !key.startsWith(PREFIX));
        TreeSet<String> known = new TreeSet<>();
        for (Setting setting : values()) {
            known.add(setting.key());
            String text = properties.getProperty(setting.key());
            if (text != null) {
                setting.value = setting.parse(text.trim());
            }
        }
        unknown.removeAll(known);
        if (!unknown.isEmpty()) {
            throw new IllegalArgumentException("unknown keys " + unknown + "; those that begin with " + PREFIX + " are " + known);
        }
    }

    private int parse(String text) {
        if (text.matches("[0-9]{1,6}")) {
            int number = Integer.parseInt(text);
            if (number >= least && number <= most) {
                return number;
            }
        }
        throw new IllegalArgumentException(
                key() + " is '" + text + "'; accepted are whole numbers from " + least + " to " + most);
    }

    String key() {
        return PREFIX + name().toLowerCase(Locale.ROOT);
    }

    int count() {
        return value;
    }

    int seconds() {
        return value;
    }

    long nanos() {
        return value * 1_000_000_000L;
    }
}
