package checkpoint

import (
	"errors"
	"fmt"
	"math"
	"strings"
)

// storageTypes gives the element type of torch's typed storages. An untyped
// storage counts bytes.
var storageTypes = map[string]DType{
	"DoubleStorage": F64, "FloatStorage": F32, "HalfStorage": F16, "BFloat16Storage": BF16,
	"LongStorage": I64, "IntStorage": I32, "ShortStorage": I16, "CharStorage": I8,
	"ByteStorage": U8, "BoolStorage": Bool, "UntypedStorage": U8,
}

// torchDTypes are the dtypes torch.save names by themselves.
var torchDTypes = map[string]DType{
	"float64": F64, "float32": F32, "float16": F16, "bfloat16": BF16,
	"int64": I64, "int32": I32, "int16": I16, "int8": I8,
	"uint64": U64, "uint32": U32, "uint16": U16, "uint8": U8, "bool": Bool,
	"float8_e5m2": F8E5M2, "float8_e4m3fn": F8E4M3,
}

// rebuilders are the functions whose result is interpreted.
var rebuilders = map[global]func(args tuple) (any, error){
	{"collections", "OrderedDict"}:                    dictFrom,
	{"collections", "defaultdict"}:                    func(tuple) (any, error) { return &dict{}, nil },
	{"builtins", "dict"}:                              dictFrom,
	{"__builtin__", "dict"}:                           dictFrom,
	{"builtins", "list"}:                              sequenceFrom,
	{"__builtin__", "list"}:                           sequenceFrom,
	{"builtins", "set"}:                               sequenceFrom,
	{"__builtin__", "set"}:                            sequenceFrom,
	{"builtins", "frozenset"}:                         sequenceFrom,
	{"__builtin__", "frozenset"}:                      sequenceFrom,
	{"torch", "Size"}:                                 sequenceFrom,
	{"torch", "device"}:                               firstArg,
	{"_codecs", "encode"}:                             codecsEncode,
	{"numpy.core.multiarray", "scalar"}:               numpyScalar,
	{"numpy._core.multiarray", "scalar"}:              numpyScalar,
	{"numpy", "dtype"}:                                firstArg,
	{"copy_reg", "_reconstructor"}:                    reconstruct,
	{"copyreg", "_reconstructor"}:                     reconstruct,
	{"torch._utils", "_rebuild_tensor"}:               rebuildTensor,
	{"torch._utils", "_rebuild_tensor_v2"}:            rebuildTensor,
	{"torch._utils", "_rebuild_tensor_v3"}:            rebuildTensorV3,
	{"torch._utils", "_rebuild_parameter"}:            firstArg,
	{"torch._utils", "_rebuild_parameter_with_state"}: firstArg,
}

// inert are further classes that checkpoints mention beside their weights.
// Their instances become placeholders.
var inert = map[string]bool{
	"argparse.Namespace": true, "types.SimpleNamespace": true, "typing.Any": true,
	"pathlib.Path": true, "pathlib.PosixPath": true, "pathlib.PurePosixPath": true, "pathlib.WindowsPath": true,
	"datetime.datetime": true, "datetime.timedelta": true, "datetime.timezone": true, "datetime.date": true,
	"collections.Counter": true, "collections.deque": true,
	"numpy.ndarray": true, "numpy.core.multiarray._reconstruct": true, "numpy._core.multiarray._reconstruct": true,
	"numpy.float64": true, "numpy.float32": true, "numpy.int64": true, "numpy.int32": true, "numpy.bool_": true,
	"easydict.EasyDict": true, "ml_collections.config_dict.config_dict.ConfigDict": true,
}

// inertPackages hold classes of trainers and configurations; a released
// checkpoint may carry instances.
var inertPackages = []string{"pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "torch.nn.", "torch.optim.", "torch.amp.", "torch.cuda.amp."}

var builtinTypes = map[string]bool{"object": true, "int": true, "float": true, "bool": true, "str": true, "bytes": true, "bytearray": true, "tuple": true, "complex": true, "slice": true, "range": true}

// allowed reports whether a pickle may mention g at all.
func (g global) allowed() bool {
	if _, ok := rebuilders[g]; ok || inert[g.String()] {
		return true
	}
	switch g.module {
	case "torch":
		_, dtype := torchDTypes[g.name]
		return dtype || strings.HasSuffix(g.name, "Storage") || g.name == "Tensor"
	case "torch.storage":
		return g.name == "UntypedStorage" || g.name == "TypedStorage"
	case "torch._tensor":
		return g.name == "_rebuild_from_type_v2"
	case "torch.nn.parameter":
		return g.name == "Parameter"
	case "builtins", "__builtin__":
		return builtinTypes[g.name]
	}
	for _, p := range inertPackages {
		if strings.HasPrefix(g.module+".", p) {
			return true
		}
	}
	return false
}

func (u *unpickler) global(module, name string) error {
	g := global{module, name}
	if !g.allowed() {
		return fmt.Errorf("the pickle refers to %s, which a checkpoint of tensors has no use for; margo runs no code from a file (if you trust it, save its state dict alone)", quote(g.String()))
	}
	return u.push(g)
}

// call is what REDUCE and NEWOBJ come to: nothing is called, the few known
// names build data, every other allowed name gives a placeholder.
func (u *unpickler) call(fn, args any) error {
	g, ok := fn.(global)
	if !ok {
		return fmt.Errorf("%s cannot be called", kindOf(fn))
	}
	a, ok := args.(tuple)
	if !ok {
		return fmt.Errorf("arguments of %s are %s", g, kindOf(args))
	}
	// Tensor subclasses wrap (function, type, arguments, state).
	if g == (global{"torch._tensor", "_rebuild_from_type_v2"}) && len(a) >= 3 {
		inner, _ := a[0].(global)
		if in, ok := a[2].(tuple); ok && rebuilders[inner] != nil {
			g, a = inner, in
		}
	}
	rebuild, ok := rebuilders[g]
	if !ok {
		return u.push(&object{class: g})
	}
	// A memoized argument can be passed any number of times, and some results
	// copy it: what is copied in all is bounded.
	for _, x := range a {
		switch x := x.(type) {
		case string:
			u.copied += len(x)
		case *list:
			u.copied += 8 * len(x.items)
		}
	}
	if u.copied > maxCopied {
		return fmt.Errorf("%s: the calls of this pickle copy more than %d bytes", g, maxCopied)
	}
	v, err := rebuild(a)
	if err != nil {
		return fmt.Errorf("%s: %w", g, err)
	}
	return u.push(v)
}

// build applies BUILD: attributes of a Namespace are kept, those of dicts and
// tensors (an OrderedDict's _metadata) have no use.
func build(obj, state any) error {
	switch o := obj.(type) {
	case *object:
		if t, ok := state.(tuple); ok && len(t) == 2 { // (__dict__, slots)
			state = t[0]
		}
		o.state, _ = state.(*dict)
		return nil
	case *dict, *list, *tensorRef, string, nil:
		return nil
	}
	return fmt.Errorf("state set on %s", kindOf(obj))
}

func firstArg(a tuple) (any, error) {
	if len(a) == 0 {
		return nil, errors.New("no argument")
	}
	return a[0], nil
}

func dictFrom(a tuple) (any, error) {
	d := &dict{}
	if len(a) == 0 {
		return d, nil
	}
	pairs, ok := a[0].(*list)
	if !ok {
		return nil, fmt.Errorf("made from %s", kindOf(a[0]))
	}
	for _, p := range pairs.items {
		var kv []any
		switch p := p.(type) {
		case tuple:
			kv = p
		case *list:
			kv = p.items
		}
		if len(kv) != 2 {
			return nil, errors.New("an item is not a pair")
		}
		d.set(kv[0], kv[1])
	}
	return d, nil
}

func sequenceFrom(a tuple) (any, error) {
	if len(a) == 0 {
		return &list{}, nil
	}
	switch s := a[0].(type) {
	case *list:
		return s, nil
	case tuple:
		return s, nil
	}
	return nil, fmt.Errorf("made from %s", kindOf(a[0]))
}

// codecsEncode is how protocol 2 writes bytes: text of code points below 256.
func codecsEncode(a tuple) (any, error) {
	if len(a) != 2 || a[1] != "latin1" {
		return nil, errors.New("only latin1 is known")
	}
	s, ok := a[0].(string)
	if !ok {
		return nil, fmt.Errorf("made from %s", kindOf(a[0]))
	}
	b := make([]byte, 0, len(s))
	for _, r := range s {
		if r > 255 {
			return nil, errors.New("text outside latin1")
		}
		b = append(b, byte(r))
	}
	return b, nil
}

// numpyScalar reads the little-endian scalars that configurations hold.
func numpyScalar(a tuple) (any, error) {
	if len(a) != 2 {
		return &object{class: global{"numpy", "generic"}}, nil
	}
	code, _ := a[0].(string)
	b, _ := a[1].([]byte)
	switch {
	case code == "f8" && len(b) == 8:
		return math.Float64frombits(le.Uint64(b)), nil
	case code == "f4" && len(b) == 4:
		return float64(math.Float32frombits(le.Uint32(b))), nil
	case code == "i8" && len(b) == 8:
		return int64(le.Uint64(b)), nil
	case code == "i4" && len(b) == 4:
		return int64(int32(le.Uint32(b))), nil
	case code == "b1" && len(b) == 1:
		return b[0] != 0, nil
	}
	return &object{class: global{"numpy", "generic"}}, nil
}

// reconstruct is copyreg's way to make an instance without its constructor.
func reconstruct(a tuple) (any, error) {
	v, err := firstArg(a)
	if err != nil {
		return nil, err
	}
	g, ok := v.(global)
	if !ok {
		return nil, fmt.Errorf("%s is not a class", kindOf(v))
	}
	return &object{class: g}, nil
}

// persistent reads torch's reference to a storage:
// ("storage", storage type, key, location, number of elements).
func persistent(id any) (*storageRef, error) {
	t, ok := id.(tuple)
	if !ok || len(t) < 5 || t[0] != "storage" {
		return nil, errors.New("a persistent id that is not a torch storage")
	}
	typ, ok1 := t[1].(global)
	key, ok2 := t[2].(string)
	elems, ok3 := t[4].(int64)
	if !ok1 || !ok2 || !ok3 || elems < 0 {
		return nil, errors.New("a malformed reference to a storage")
	}
	d, ok := storageTypes[typ.name]
	if !ok {
		d = DType(typ.String()) // readable only by name
	}
	return &storageRef{dtype: d, key: key, elems: elems}, nil
}

// rebuildTensor takes (storage, offset, size, stride, …).
func rebuildTensor(a tuple) (any, error) {
	if len(a) < 4 {
		return nil, fmt.Errorf("%d arguments", len(a))
	}
	s, ok := a[0].(*storageRef)
	off, ok2 := a[1].(int64)
	if !ok || !ok2 || off < 0 {
		return nil, errors.New("malformed storage or offset")
	}
	shape, err := sizes(a[2])
	if err != nil {
		return nil, err
	}
	stride, err := sizes(a[3])
	if err != nil {
		return nil, err
	}
	if len(shape) != len(stride) {
		return nil, fmt.Errorf("%d dimensions, %d strides", len(shape), len(stride))
	}
	return &tensorRef{storage: s, dtype: s.dtype, offset: off, shape: shape, stride: stride}, nil
}

// rebuildTensorV3 takes (storage, offset, size, stride, requires_grad, hooks,
// dtype) with an untyped storage; the offset counts elements of dtype.
func rebuildTensorV3(a tuple) (any, error) {
	v, err := rebuildTensor(a)
	if err != nil {
		return nil, err
	}
	if len(a) < 7 {
		return nil, fmt.Errorf("%d arguments", len(a))
	}
	g, _ := a[6].(global)
	t := v.(*tensorRef)
	if t.dtype = torchDTypes[g.name]; g.module != "torch" || t.dtype == "" {
		t.dtype = DType(g.String())
	}
	return t, nil
}

// sizes reads a tuple of non-negative integers.
func sizes(v any) ([]int64, error) {
	var items []any
	switch v := v.(type) {
	case tuple:
		items = v
	case *list:
		items = v.items
	default:
		return nil, fmt.Errorf("%s where sizes were expected", kindOf(v))
	}
	if len(items) > maxRank {
		return nil, fmt.Errorf("%d dimensions, the limit is %d", len(items), maxRank)
	}
	out := make([]int64, len(items))
	for i, x := range items {
		n, ok := x.(int64)
		if !ok || n < 0 {
			return nil, errors.New("a size or stride that is not a non-negative integer")
		}
		out[i] = n
	}
	return out, nil
}
