package checkpoint

import "margo/engine"

// ParseMAR reads a MAR's configuration from a JSON object with the authors'
// argument names. What it leaves out has the authors' default; widths, depths
// and heads have none and must be there.
func ParseMAR(text string) (*MARConfig, error) {
	m, err := parseObject(text)
	if err != nil {
		return nil, engine.Errorf("MAR config", engine.IO, "%w", err)
	}
	c := marDefaults()
	if err := setFields(&c, m); err != nil {
		return nil, engine.Errorf("MAR config", engine.IO, "%w", err)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &c, nil
}
