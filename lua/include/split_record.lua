-- Take a record apart: the game's id, '' when it is in none, and the body, which is all the rest.
-- A record is '<length of the game's id>:<game's id><body>', so any id can stand in it, and a game keeps the bodies.
local function split_record(record)
  local length, rest = string.match(record, '^(%d+):(.*)$')
  return string.sub(rest, 1, length), string.sub(rest, length + 1)
end
