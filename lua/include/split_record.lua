-- Take a record apart: the game's id, '' when it is in none, and the body, which is all the rest.
-- A record is '<length of the game's id>:<game's id><body>', so any id can stand in it, and a game keeps the bodies.
local function split_record(record)
  local colon = string.find(record, ':', 1, true)
  local game_end = colon + string.sub(record, 1, colon - 1)
  return string.sub(record, colon + 1, game_end), string.sub(record, game_end + 1)
end
