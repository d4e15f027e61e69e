-- @include clock
-- A number from 0 to just below 1, taken from the clock: each microsecond of a second gives a different one, and
-- neighbours give numbers far apart. (The server gives math.random the same seed for each script.)
local random_number = clock[2] * 618033 % 1000000 / 1000000
