-- A number from 0 to below 1 out of the clock: its last digits, the last one first, since that changes the most. (The
-- server gives math.random the same seed for each script.)
local function random_number(time_us)
  return tonumber(string.reverse(string.sub(time_us, -6))) / 1000000
end
