package checkpoint

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strconv"
	"strings"
)

// maxJSON bounds a configuration's text.
const maxJSON = 1 << 20

// parseObject reads a JSON object with its numbers kept as text.
func parseObject(text string) (map[string]any, error) {
	if len(text) > maxJSON {
		return nil, fmt.Errorf("%d bytes of JSON, the limit is %d", len(text), maxJSON)
	}
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var out map[string]any
	if err := dec.Decode(&out); err != nil {
		return nil, err
	}
	if out == nil {
		return nil, fmt.Errorf("not a JSON object")
	}
	if dec.More() {
		return nil, fmt.Errorf("text after the JSON object")
	}
	return out, nil
}

// setFields fills the fields of *dst, a struct, from values by their json tags.
// Numbers may be text ("100", as the authors' num_sampling_steps is); null and
// keys that no field has are passed over, since trainers put all their settings
// into the same place.
func setFields(dst any, values map[string]any) error {
	v := reflect.ValueOf(dst).Elem()
	for i := 0; i < v.NumField(); i++ {
		key, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		x, ok := values[key]
		if !ok || x == nil || key == "" || key == "-" {
			continue
		}
		if err := setField(v.Field(i), x); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

func setField(f reflect.Value, x any) error {
	switch f.Kind() {
	case reflect.Int:
		n, err := number(x)
		if err != nil {
			return err
		}
		if n != math.Trunc(n) || math.Abs(n) > 1<<40 {
			return fmt.Errorf("%v is not an integer of reasonable size", x)
		}
		f.SetInt(int64(n))
	case reflect.Float64:
		n, err := number(x)
		if err != nil {
			return err
		}
		f.SetFloat(n)
	case reflect.String:
		s, ok := x.(string)
		if !ok {
			return fmt.Errorf("%v is not text", x)
		}
		f.SetString(s)
	}
	return nil
}

// number accepts what JSON, a pickle or a text setting may hold.
func number(x any) (float64, error) {
	var n float64
	var err error
	switch x := x.(type) {
	case float64:
		n = x
	case int64:
		n = float64(x)
	case json.Number:
		n, err = strconv.ParseFloat(x.String(), 64)
	case string:
		n, err = strconv.ParseFloat(strings.TrimSpace(x), 64)
	default:
		return 0, fmt.Errorf("%v is not a number", x)
	}
	if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
		return 0, fmt.Errorf("%q is not a finite number", fmt.Sprint(x))
	}
	return n, nil
}
