-- @include clock
-- A number from 0 to below 1 out of the clock: each microsecond of a second gives another, and neighbours give numbers
-- far apart. (The server gives math.random the same seed for each script.)
local random_number = clock[2] * 618033 % 1000000 / 1000000
