package damoyolo.frontend;

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.lang.invoke.MethodHandles;
import java.lang.invoke.MethodType;
import java.lang.reflect.Constructor;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/**
 * A class of TorchServe that creates objects of other classes than it was compiled for.
 *
 * <p>Class files name other classes in their constant pool (Java Virtual Machine Specification, 4.4), so
 * replacing a text there is enough; no code is rewritten.
 */
final class ClassPatch {
    private final byte[] patched;

    /**
     * Reads `owner` and replaces the classes that it creates: names of TorchServe's by classes of this package.
     *
     * @throws IllegalStateException `owner` does not create one of them, uses more of it than its constructor, or
     *     uses a constructor that the replacement does not have
     */
    ClassPatch(String owner, Map<String, Class<?>> replacements) throws ReflectiveOperationException {
        try (InputStream file = getClass().getClassLoader().getResourceAsStream(owner + ".class")) {
            if (file == null) {
                throw new ClassNotFoundException(owner);
            }
            patched = rename(owner, file.readAllBytes(), replacements);
        } catch (IOException error) {
            throw new ClassNotFoundException(owner, error);
        }
    }

    /** Loads the class, in the package and by the class loader of `neighbour`. */
    void defineBeside(Class<?> neighbour) throws IllegalAccessException {
        MethodHandles.privateLookupIn(neighbour, MethodHandles.lookup()).defineClass(patched);
    }

    private static byte[] rename(String owner, byte[] original, Map<String, Class<?>> replacements) throws IOException {
        DataInputStream in = new DataInputStream(new ByteArrayInputStream(original));
        ByteArrayOutputStream bytes = new ByteArrayOutputStream(original.length + 64);
        DataOutputStream out = new DataOutputStream(bytes);
        out.writeLong(in.readLong()); // magic number and version
        int count = in.readUnsignedShort();
        out.writeShort(count);
        String[] texts = new String[count];
        int[][] pairs = new int[count][]; // the two indices of an entry; the second is 0 where it has one
        int[] tags = new int[count];
        for (int index = 1; index < count; index++) {
            int tag = tags[index] = in.readUnsignedByte();
            out.writeByte(tag);
            switch (tag) {
                case 1: // Utf8
                    texts[index] = in.readUTF();
                    Class<?> to = replacements.get(texts[index]);
                    out.writeUTF(to == null ? texts[index] : to.getName().replace('.', '/'));
                    break;
                case 7: case 8: case 16: case 19: case 20: // Class, String, MethodType, Module, Package
                    pairs[index] = new int[] {in.readUnsignedShort(), 0};
                    out.writeShort(pairs[index][0]);
                    break;
                case 9: case 10: case 11: case 12: case 17: case 18: // references to members, NameAndType
                    pairs[index] = new int[] {in.readUnsignedShort(), in.readUnsignedShort()};
                    out.writeShort(pairs[index][0]);
                    out.writeShort(pairs[index][1]);
                    break;
                case 15: // MethodHandle
                    out.writeByte(in.readUnsignedByte());
                    out.writeShort(in.readUnsignedShort());
                    break;
                case 3: case 4: // Integer, Float
                    out.writeInt(in.readInt());
                    break;
                case 5: case 6: // Long, Double: they count as two entries
                    out.writeLong(in.readLong());
                    index++;
                    break;
                default:
                    throw new IllegalStateException(owner + " has constants of an unknown kind, " + tag);
            }
        }
        replacements.forEach((from, to) -> requireOnlyConstructors(owner, from, to, tags, texts, pairs));
        in.transferTo(out);
        return bytes.toByteArray();
    }

    private static void requireOnlyConstructors(
            String owner, String from, Class<?> to, int[] tags, String[] texts, int[][] pairs) {
        Set<String> available = new HashSet<>();
        for (Constructor<?> constructor : to.getConstructors()) {
            MethodType type = MethodType.methodType(void.class, constructor.getParameterTypes());
            available.add("<init>" + type.toMethodDescriptorString());
        }
        int uses = 0;
        for (int index = 1; index < tags.length; index++) {
            if (tags[index] < 9 || tags[index] > 11 || !from.equals(texts[pairs[pairs[index][0]][0]])) {
                continue;
            }
            int[] nameAndType = pairs[pairs[index][1]];
            String member = texts[nameAndType[0]] + texts[nameAndType[1]];
            if (!available.contains(member)) {
                throw new IllegalStateException(owner + " uses " + from + "." + member);
            }
            uses++;
        }
        if (uses == 0) {
            throw new IllegalStateException(owner + " does not create " + from);
        }
    }
}
